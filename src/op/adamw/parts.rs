//! Up to sixteen tensors as one argument of an operation.

#![allow(
    clippy::large_enum_variant,
    reason = "they live for a call, and so do those that the macro makes of them"
)]

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType};

/// An enum of one variant for each number of tensors: Burn's derive knows no lists.
macro_rules! flat_parts {
    ($($name:ident($($field:ident)+),)+) => {
        /// Tensors of one dtype that are added to a flat buffer.
        #[derive(ExtensionType)]
        #[cfg_attr(feature = "fusion", extension_type(fusion))]
        pub enum FlatParts<B: Backend> {
            $(
                #[doc = concat!("The number of them.", $(" `", stringify!($field), "`"),+)]
                $name($(#[doc = stringify!($field)] FloatTensor<B>),+),
            )+
        }

        impl<B: Backend> FlatParts<B> {
            /// All of them, if there are one to sixteen.
            pub(in crate::op) fn new(tensors: Vec<FloatTensor<B>>) -> Option<Self> {
                let count = tensors.len();
                let mut tensors = tensors.into_iter();
                $(
                    if count == [$(stringify!($field)),+].len() {
                        $(let $field = tensors.next()?;)+
                        return Some(Self::$name($($field),+));
                    }
                )+
                None
            }

            /// The tensors, in their order.
            pub(in crate::op) fn into_vec(self) -> Vec<FloatTensor<B>> {
                match self {
                    $(Self::$name($($field),+) => vec![$($field),+],)+
                }
            }
        }
    };
}

flat_parts! {
    One(a),
    Two(a b),
    Three(a b c),
    Four(a b c d),
    Five(a b c d e),
    Six(a b c d e f),
    Seven(a b c d e f g),
    Eight(a b c d e f g h),
    Nine(a b c d e f g h i),
    Ten(a b c d e f g h i j),
    Eleven(a b c d e f g h i j k),
    Twelve(a b c d e f g h i j k l),
    Thirteen(a b c d e f g h i j k l m),
    Fourteen(a b c d e f g h i j k l m n),
    Fifteen(a b c d e f g h i j k l m n o),
    Sixteen(a b c d e f g h i j k l m n o p),
}
