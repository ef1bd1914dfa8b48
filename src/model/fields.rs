//! What hands out linear layers: a layer itself, fields of such, and structs by a macro.

use super::layers::{LinearLayers, MapLinear};
use crate::error::Nf4Error;
use crate::nn::AnyLinear;

/// A path with one more name at its end.
///
/// ```
/// use burn_nf4::model::join_path;
///
/// assert_eq!(join_path("layers", "0"), "layers.0");
/// assert_eq!(join_path("", "layers"), "layers");
/// ```
pub fn join_path(path: &str, name: &str) -> String {
    match path {
        "" => name.into(),
        _ => format!("{path}.{name}"),
    }
}

impl LinearLayers for AnyLinear {
    fn collect_linears<'a>(&'a self, path: &str, found: &mut Vec<(String, &'a AnyLinear)>) {
        found.push((path.into(), self));
    }

    fn map_linears(self, path: &str, map: &mut MapLinear<'_>) -> Result<Self, Nf4Error> {
        map(path, self)
    }
}

impl<T: LinearLayers> LinearLayers for Option<T> {
    fn collect_linears<'a>(&'a self, path: &str, found: &mut Vec<(String, &'a AnyLinear)>) {
        if let Some(inner) = self {
            inner.collect_linears(path, found);
        }
    }

    fn map_linears(self, path: &str, map: &mut MapLinear<'_>) -> Result<Self, Nf4Error> {
        self.map(|inner| inner.map_linears(path, map)).transpose()
    }
}

impl<T: LinearLayers> LinearLayers for Vec<T> {
    fn collect_linears<'a>(&'a self, path: &str, found: &mut Vec<(String, &'a AnyLinear)>) {
        for (index, inner) in self.iter().enumerate() {
            inner.collect_linears(&join_path(path, &index.to_string()), found);
        }
    }

    fn map_linears(self, path: &str, map: &mut MapLinear<'_>) -> Result<Self, Nf4Error> {
        let inner = self.into_iter().enumerate();
        inner
            .map(|(index, inner)| inner.map_linears(&join_path(path, &index.to_string()), map))
            .collect()
    }
}

/// Implements [`LinearLayers`](crate::model::LinearLayers) for a struct: its name, and the fields that
/// are linear layers or modules with such in them, if any. Functions to override follow in braces; those
/// of the whole model count, not those of modules within it.
///
/// A field can be an [`AnyLinear`](crate::nn::AnyLinear), a module that implements the trait, or an
/// `Option` or a `Vec` of these. For arrays, tuples and maps write the trait's two functions by hand,
/// with [`join_path`](crate::model::join_path).
///
/// ```
/// use burn::module::{Module, Param};
/// use burn::tensor::Tensor;
/// use burn_nf4::linear_layers;
/// use burn_nf4::model::TiedHead;
/// use burn_nf4::nn::AnyLinear;
///
/// #[derive(Module, Debug)]
/// struct Model {
///     embed_tokens: Param<Tensor<2>>,
///     layers: Vec<AnyLinear>,
///     /// None where the head is the table of the embedding.
///     lm_head: Option<AnyLinear>,
/// }
///
/// linear_layers!(Model { layers, lm_head } {
///     fn checkpoint_name(path: &str) -> String {
///         match path {
///             "embed_tokens" => "model.embed_tokens.weight".into(),
///             path if path.starts_with("lm_head") => path.into(),
///             path => format!("model.{path}"),
///         }
///     }
///
///     fn tied_head(&self) -> Option<TiedHead> {
///         self.lm_head.is_none().then(|| TiedHead {
///             head: "lm_head".into(),
///             embedding: "model.embed_tokens".into(),
///         })
///     }
///
///     fn untie_head(mut self) -> Self {
///         self.lm_head = Some(AnyLinear::from_weight(self.embed_tokens.val(), None));
///         self
///     }
/// });
/// ```
#[macro_export]
macro_rules! linear_layers {
    ($module:ty { $($field:ident),* $(,)? } $({ $($override:tt)* })?) => {
        impl $crate::model::LinearLayers for $module {
            fn collect_linears<'a>(
                &'a self,
                path: &str,
                found: &mut Vec<(String, &'a $crate::nn::AnyLinear)>,
            ) {
                let _ = (path, &found);
                $(
                    let path_of_field = $crate::model::join_path(path, stringify!($field));
                    $crate::model::LinearLayers::collect_linears(&self.$field, &path_of_field, found);
                )*
            }

            fn map_linears(
                self,
                path: &str,
                map: &mut $crate::model::MapLinear<'_>,
            ) -> Result<Self, $crate::Nf4Error> {
                let _ = (path, &map);
                #[allow(unused_mut, reason = "there may be no field")]
                let mut module = self;
                $(
                    let path_of_field = $crate::model::join_path(path, stringify!($field));
                    module.$field =
                        $crate::model::LinearLayers::map_linears(module.$field, &path_of_field, map)?;
                )*
                Ok(module)
            }

            $($($override)*)?
        }
    };
}
