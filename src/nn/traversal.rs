//! [`Module`] for the layers, by hand: as derived, but for `map`, which keeps their float parameters
//! from being adapted or quantized once more (see [`map_plain`]).

use std::fmt;

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::tensor::Device;

use super::params::map_plain;
use super::{LoraLinear, QLoraLinear, QuantLinear};

const NF4_LINEAR: &str = "Struct:QuantLinear";

/// Shows a field to a visitor.
fn visit<V: ModuleVisitor>(field: &impl Module, name: &str, container: &str, visitor: &mut V) {
    visitor.enter_module(name, container);
    field.visit(visitor);
    visitor.exit_module(name, container);
}

/// Hands a field to a mapper in the way of `map`.
fn within<M: ModuleMapper, F>(
    field: F,
    name: &str,
    container: &str,
    mapper: &mut M,
    map: impl FnOnce(F, &mut M) -> F,
) -> F {
    mapper.enter_module(name, container);
    let field = map(field, mapper);
    mapper.exit_module(name, container);
    field
}

impl Module for QuantLinear {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        visit(&self.weight, "weight", NF4_LINEAR, visitor);
        visit(&self.bias, "bias", NF4_LINEAR, visitor);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let weight = within(self.weight, "weight", NF4_LINEAR, mapper, Module::map);
        let bias = within(self.bias, "bias", NF4_LINEAR, mapper, |bias, mapper| {
            bias.map(|bias| map_plain(bias, mapper).param)
        });
        Self {
            weight,
            bias,
            ..self
        }
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices = self.weight.collect_devices(devices);
        self.bias.collect_devices(devices)
    }

    fn to_device(self, device: &Device) -> Self {
        Self {
            weight: self.weight.to_device(device),
            bias: self.bias.to_device(device),
            ..self
        }
    }

    fn fork(self, device: &Device) -> Self {
        Self {
            weight: self.weight.fork(device),
            bias: self.bias.fork(device),
            ..self
        }
    }

    fn materialize(self) -> Self {
        Self {
            weight: self.weight.materialize(),
            bias: self.bias.materialize(),
            ..self
        }
    }

    fn valid(&self) -> Self {
        Self {
            weight: self.weight.valid(),
            bias: self.bias.valid(),
            ..self.clone()
        }
    }

    fn train(self) -> Self {
        Self {
            weight: Module::train(self.weight),
            bias: Module::train(self.bias),
            ..self
        }
    }
}

impl ModuleDisplayDefault for QuantLinear {
    fn content(&self, content: Content) -> Option<Content> {
        content
            .set_top_level_type("QuantLinear")
            .add("weight", &self.weight)
            .add("bias", &self.bias)
            .add_debug_attribute("strategy", &self.strategy)
            .optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl fmt::Display for QuantLinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&ModuleDisplay::format(self, Default::default()))
    }
}

/// A layer with a low-rank branch.
macro_rules! branch_module {
    ($layer:ident, $container:literal) => {
        impl Module for $layer {
            fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
                visit(&self.base, "base", $container, visitor);
                visit(&self.lora_a, "lora_a", $container, visitor);
                visit(&self.lora_b, "lora_b", $container, visitor);
                visit(&self.lora_magnitude, "lora_magnitude", $container, visitor);
                visit(&self.dropout, "dropout", $container, visitor);
            }

            fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
                let base = within(self.base, "base", $container, mapper, Module::map);
                let plain = |param, mapper: &mut M| map_plain(param, mapper).param;
                let lora_a = within(self.lora_a, "lora_a", $container, mapper, plain);
                let lora_b = within(self.lora_b, "lora_b", $container, mapper, plain);
                let lora_magnitude = within(
                    self.lora_magnitude,
                    "lora_magnitude",
                    $container,
                    mapper,
                    |magnitude, mapper| {
                        magnitude.map(|magnitude| map_plain(magnitude, mapper).param)
                    },
                );
                let dropout = within(self.dropout, "dropout", $container, mapper, Module::map);
                Self {
                    base,
                    lora_a,
                    lora_b,
                    lora_magnitude,
                    dropout,
                    ..self
                }
            }

            fn collect_devices(&self, devices: Devices) -> Devices {
                let devices = self.base.collect_devices(devices);
                let devices = self.lora_a.collect_devices(devices);
                let devices = self.lora_b.collect_devices(devices);
                let devices = self.lora_magnitude.collect_devices(devices);
                self.dropout.collect_devices(devices)
            }

            fn to_device(self, device: &Device) -> Self {
                Self {
                    base: self.base.to_device(device),
                    lora_a: self.lora_a.to_device(device),
                    lora_b: self.lora_b.to_device(device),
                    lora_magnitude: self.lora_magnitude.to_device(device),
                    dropout: self.dropout.to_device(device),
                    ..self
                }
            }

            fn fork(self, device: &Device) -> Self {
                Self {
                    base: self.base.fork(device),
                    lora_a: self.lora_a.fork(device),
                    lora_b: self.lora_b.fork(device),
                    lora_magnitude: self.lora_magnitude.fork(device),
                    dropout: self.dropout.fork(device),
                    ..self
                }
            }

            fn materialize(self) -> Self {
                Self {
                    base: self.base.materialize(),
                    lora_a: self.lora_a.materialize(),
                    lora_b: self.lora_b.materialize(),
                    lora_magnitude: self.lora_magnitude.materialize(),
                    dropout: self.dropout.materialize(),
                    ..self
                }
            }

            fn valid(&self) -> Self {
                Self {
                    base: self.base.valid(),
                    lora_a: self.lora_a.valid(),
                    lora_b: self.lora_b.valid(),
                    lora_magnitude: self.lora_magnitude.valid(),
                    dropout: self.dropout.valid(),
                    ..self.clone()
                }
            }

            fn train(self) -> Self {
                Self {
                    base: Module::train(self.base),
                    lora_a: Module::train(self.lora_a),
                    lora_b: Module::train(self.lora_b),
                    lora_magnitude: Module::train(self.lora_magnitude),
                    dropout: Module::train(self.dropout),
                    ..self
                }
            }
        }

        impl ModuleDisplayDefault for $layer {
            fn content(&self, content: Content) -> Option<Content> {
                content
                    .set_top_level_type(stringify!($layer))
                    .add("base", &self.base)
                    .add("lora_a", &self.lora_a)
                    .add("lora_b", &self.lora_b)
                    .add("lora_magnitude", &self.lora_magnitude)
                    .add("dropout", &self.dropout)
                    .add("scale", &self.scale)
                    .optional()
            }

            fn num_params(&self) -> usize {
                Module::num_params(self)
            }
        }

        impl fmt::Display for $layer {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&ModuleDisplay::format(self, Default::default()))
            }
        }
    };
}

branch_module!(QLoraLinear, "Struct:QLoraLinear");
branch_module!(LoraLinear, "Struct:LoraLinear");
