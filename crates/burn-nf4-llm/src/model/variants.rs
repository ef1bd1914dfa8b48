//! The linear layers of enums of modules.

/// [`LinearLayers`](burn_nf4::model::LinearLayers) for an enum of modules. The name of a variant is no
/// part of a path, as it is none in checkpoints.
macro_rules! linear_variants {
    ($module:ty { $($variant:ident),* $(,)? }) => {
        impl burn_nf4::model::LinearLayers for $module {
            fn collect_linears<'a>(
                &'a self,
                path: &str,
                found: &mut Vec<(String, &'a burn_nf4::nn::AnyLinear)>,
            ) {
                match self {
                    $(Self::$variant(module) => module.collect_linears(path, found),)*
                }
            }

            fn map_linears(
                self,
                path: &str,
                map: &mut burn_nf4::model::MapLinear<'_>,
            ) -> Result<Self, burn_nf4::Nf4Error> {
                Ok(match self {
                    $(Self::$variant(module) => Self::$variant(module.map_linears(path, map)?),)*
                })
            }
        }
    };
}

pub(super) use linear_variants;
