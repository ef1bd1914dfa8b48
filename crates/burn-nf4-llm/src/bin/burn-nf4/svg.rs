//! What the charts of the program share: an SVG, and texts in it.

use std::error::Error;
use std::path::Path;

use burn_nf4_llm::ModelError;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub const OURS: RGBColor = RGBColor(23, 78, 166);
pub const OTHER: RGBColor = RGBColor(217, 95, 14);
pub const GREY: RGBColor = RGBColor(90, 90, 90);
pub const PALE: RGBColor = RGBColor(222, 222, 222);

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub type Drawn = Result<(), Box<dyn Error>>;

/// Writes a drawing of a size in pixels.
///
/// # Errors
/// [`ModelError::Io`] if the file cannot be written.
pub fn write(
    path: &Path,
    (width, height): (i32, i32),
    draw: impl FnOnce(&Area) -> Drawn,
) -> Result<(), ModelError> {
    let drawn = || -> Drawn {
        let area = SVGBackend::new(path, (width as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        draw(&area)?;
        area.present()?;
        Ok(())
    };
    drawn().map_err(|error| ModelError::Io {
        path: path.into(),
        source: std::io::Error::other(error.to_string()),
    })
}

pub fn text(
    area: &Area,
    content: &str,
    at: (i32, i32),
    size: i32,
    h: HPos,
    colour: RGBColor,
) -> Drawn {
    let style = ("sans-serif", size)
        .into_font()
        .color(&colour)
        .pos(Pos::new(h, VPos::Center));
    area.draw(&Text::new(content.to_string(), at, style))?;
    Ok(())
}

/// A row of names beside squares of their colours.
pub fn legend(area: &Area, mut x: i32, y: i32, names: &[(&str, RGBColor)]) -> Drawn {
    for &(name, colour) in names {
        let corners = [(x, y - 6), (x + 12, y + 6)];
        area.draw(&Rectangle::new(corners, colour.filled()))?;
        text(area, name, (x + 17, y), 13, HPos::Left, BLACK)?;
        x += 37 + name.len() as i32 * 7;
    }
    Ok(())
}
