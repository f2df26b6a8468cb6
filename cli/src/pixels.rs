//! Images as CLIP's vision tower takes them: decoded, turned upright, resized, cropped, scaled and normalised as
//! `preprocessor_config.json` says.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use image::imageops::{FilterType, resize, rotate90, rotate270};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};
use laneformer_models::config::read_object;
use laneformer_models::conv::Images;
use serde::Deserialize;

/// Images that would become larger on their way are refused: strips of a few pixels' width, which nobody can classify.
const MAX_PIXELS: u64 = 1 << 26;

/// `preprocessor_config.json`; what it does not say is as Hugging Face's CLIP has it.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Config {
    do_resize: bool,
    size: Size,
    resample: u32,
    do_center_crop: bool,
    crop_size: Size,
    do_rescale: bool,
    rescale_factor: f64,
    do_normalize: bool,
    image_mean: [f32; 3],
    image_std: [f32; 3],
}

impl Default for Config {
    fn default() -> Config {
        Config {
            do_resize: true,
            size: Size::Number(224),
            resample: BICUBIC,
            do_center_crop: true,
            crop_size: Size::Number(224),
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

impl Config {
    /// What the model is given for a pixel of a channel.
    fn value(&self, pixel: u8, channel: usize) -> f32 {
        let value = (f64::from(pixel) * if self.do_rescale { self.rescale_factor } else { 1.0 }) as f32;
        if self.do_normalize { (value - self.image_mean[channel]) / self.image_std[channel] } else { value }
    }
}

/// A number is the shortest edge where images are resized, and both where they are cropped.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a number, or a shortest_edge, or a height and a width")]
enum Size {
    Number(u32),
    Shortest { shortest_edge: u32 },
    Both { height: u32, width: u32 },
}

impl Size {
    fn is_possible(self) -> bool {
        let edges = match self {
            Size::Number(edge) | Size::Shortest { shortest_edge: edge } => [edge; 2],
            Size::Both { height, width } => [height, width],
        };
        edges.iter().all(|edge| (1..=8192).contains(edge))
    }
}

/// Names of filters in `resample`, as Pillow numbers them.
const BILINEAR: u32 = 2;
const BICUBIC: u32 = 3;

/// From a file to the pixels of a model of `side` x `side` of them.
pub struct Preprocessor {
    path: PathBuf,
    config: Config,
    side: u32,
}

impl Preprocessor {
    /// Reads the `preprocessor_config.json` of a directory.
    pub fn open(dir: &Path, side: usize) -> anyhow::Result<Preprocessor> {
        let path = dir.join("preprocessor_config.json");
        let config: Config = read_object(&path)?;
        let field = |name: &str, expected: &str| format!("{}: {name}: expected {expected}", path.display());
        ensure!(
            [BILINEAR, BICUBIC].contains(&config.resample),
            "{}, got {}",
            field("resample", "2 (bilinear) or 3 (bicubic)"),
            config.resample
        );
        if let Size::Shortest { .. } = config.crop_size {
            bail!(field("crop_size", "a number, or height and width"));
        }
        ensure!(
            config.image_std.iter().all(|&std| std != 0.0),
            "{}, got 0",
            field("image_std", "numbers other than 0")
        );
        for (name, is_used, size) in
            [("size", config.do_resize, config.size), ("crop_size", config.do_center_crop, config.crop_size)]
        {
            ensure!(!is_used || size.is_possible(), field(name, "edges of 1 to 8192 pixels"));
        }
        // Each value lies between those of black and of white.
        let values = [0, 255].map(|pixel| [0, 1, 2].map(|channel| config.value(pixel, channel)));
        ensure!(
            values.as_flattened().iter().all(|value| value.is_finite()),
            field("rescale_factor, image_mean, image_std", "numbers that make finite pixels")
        );
        let side = side.try_into().map_err(|_| anyhow!("image_size: {side} is too large"))?;
        Ok(Preprocessor { path, config, side })
    }

    /// The pixels of an image.
    pub fn load(&self, file: &Path) -> anyhow::Result<Images> {
        let image = decode(file).with_context(|| file.display().to_string())?;
        let image = self.resized(image).with_context(|| file.display().to_string())?;
        let (height, width) = match (self.config.do_center_crop, self.config.crop_size) {
            (false, _) => (image.height(), image.width()),
            (true, Size::Number(side) | Size::Shortest { shortest_edge: side }) => (side, side),
            (true, Size::Both { height, width }) => (height, width),
        };
        ensure!(
            (height, width) == (self.side, self.side),
            "{}: {} gives {width} x {height} pixels, but the model takes {} x {}",
            file.display(),
            self.path.display(),
            self.side,
            self.side
        );
        let side = self.side as usize;
        Ok(Images::from_planes(&self.planes(&image), [1, 3, side, side])?)
    }

    fn resized(&self, image: RgbImage) -> anyhow::Result<RgbImage> {
        let (width, height) = image.dimensions();
        let (new_width, new_height) = match self.config.size {
            _ if !self.config.do_resize => return Ok(image),
            Size::Both { height, width } => (width.into(), height.into()),
            Size::Number(short) | Size::Shortest { shortest_edge: short } => {
                let along =
                    |edge: u32| u64::from(short) * u64::from(edge) / u64::from(width.min(height).max(1));
                (along(width), along(height))
            }
        };
        let is_small = new_width > 0 && new_height > 0 && new_width.saturating_mul(new_height) <= MAX_PIXELS;
        ensure!(is_small, "cannot resize {width} x {height} pixels to {new_width} x {new_height}");
        let filter = match self.config.resample {
            BILINEAR => FilterType::Triangle,
            _ => FilterType::CatmullRom,
        };
        Ok(resized(image, new_width as u32, new_height as u32, filter))
    }

    /// The middle of the image, with black around it where it is smaller: [channels, side, side].
    fn planes(&self, image: &RgbImage) -> Vec<f32> {
        let [width, height, side] = [image.width(), image.height(), self.side].map(i64::from);
        let (left, top) = ((width - side).div_euclid(2), (height - side).div_euclid(2));
        let value = |channel: usize, x: i64, y: i64| {
            let is_inside = (0..width).contains(&x) && (0..height).contains(&y);
            let pixel = if is_inside { image.get_pixel(x as u32, y as u32)[channel] } else { 0 };
            self.config.value(pixel, channel)
        };
        let row = |channel, y| (left..left + side).map(move |x| value(channel, x, y));
        (0..3).flat_map(|channel| (top..top + side).flat_map(move |y| row(channel, y))).collect()
    }
}

/// The pixels of a file, upright; what is transparent, as if it were not.
fn decode(file: &Path) -> anyhow::Result<RgbImage> {
    let reader = ImageReader::open(file)?.with_guessed_format()?;
    // The decoder would make the rest of such a file grey without a word.
    if reader.format() == Some(ImageFormat::Jpeg) {
        ensure!(has_end(&fs::read(file)?), "the JPEG data is cut short");
    }
    let mut decoder = reader.into_decoder()?;
    // What a header says of its size must not decide how much is allocated.
    Limits::default().reserve(decoder.total_bytes())?;
    let orientation = decoder.orientation()?;
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

/// Whether the end marker of a JPEG follows the header of its first scan; what comes before may hold another JPEG.
fn has_end(jpeg: &[u8]) -> bool {
    let mut rest = jpeg.get(2..).unwrap_or(&[]);
    while let [0xff, marker, high, low, ..] = *rest
        && marker != 0xda
    {
        let segment = 2 + usize::from(u16::from_be_bytes([high, low]));
        rest = rest.get(if marker == 0xff { 1 } else { segment }..).unwrap_or(&[]);
    }
    rest.windows(2).any(|pair| pair == [0xff, 0xd9])
}

/// First the columns, then the rows, rounded to bytes in between: what Pillow does. One call of `resize` would do rows, then
/// columns, with floats in between.
fn resized(image: RgbImage, width: u32, height: u32, filter: FilterType) -> RgbImage {
    let turned = rotate90(&image);
    let turned = resize(&turned, turned.width(), width, filter);
    resize(&rotate270(&turned), width, height, filter)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use image::RgbImage;

    use super::{Config, Preprocessor, Size, has_end};

    /// The expected numbers are those of transformers' `CLIPImageProcessor` with Pillow for this image.
    fn image(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            image::Rgb([0, 1, 2].map(|c| ((x * 37 + y * 91 + c * 53 + x * y * 7) % 256) as u8))
        })
    }

    fn preprocessor(config: Config, side: u32) -> Preprocessor {
        Preprocessor { path: PathBuf::new(), config, side }
    }

    /// The first channel, resized to a shortest edge of 8 and cropped.
    fn resized(width: u32, height: u32) -> Vec<f32> {
        let (size, crop_size) = (Size::Number(8), Size::Both { height: 8, width: 8 });
        let config = Config { size, crop_size, do_rescale: false, do_normalize: false, ..Config::default() };
        let preprocessor = preprocessor(config, 8);
        preprocessor.planes(&preprocessor.resized(image(width, height)).unwrap())[..64].to_vec()
    }

    #[test]
    #[rustfmt::skip]
    fn images_are_resized_as_pillow_does() {
        let smaller: [u8; 64] = [
            122, 127, 108, 113, 138, 130, 87, 174, 139, 143, 129, 136, 109, 130, 146, 123, 129, 151, 117, 146, 125,
            156, 148, 132, 125, 129, 130, 132, 132, 134, 108, 144, 164, 99, 145, 110, 148, 129, 112, 104, 125, 92,
            100, 160, 146, 125, 117, 141, 94, 95, 97, 124, 132, 127, 137, 134, 139, 91, 136, 146, 144, 118, 112, 153,
        ];
        let larger: [u8; 64] = [
            0, 7, 32, 55, 78, 101, 137, 161, 36, 51, 80, 115, 150, 173, 116, 72, 106, 126, 156, 161, 185, 214, 95, 6,
            178, 210, 226, 91, 40, 88, 103, 109, 96, 125, 152, 86, 75, 130, 181, 210, 13, 38, 84, 134, 164, 176, 216,
            242, 84, 117, 174, 233, 190, 64, 89, 128, 166, 132, 96, 148, 149, 99, 136, 172,
        ];
        for (expected, actual) in [(smaller, resized(23, 17)), (larger, resized(5, 6))] {
            // Pillow's weights are integers: a value near one half may be rounded to the other side, once for each direction.
            let off = expected.iter().zip(&actual).map(|(&a, &b)| (f32::from(a) - b).abs());
            assert!(off.clone().all(|off| off <= 2.0), "{actual:?}");
            assert!(off.filter(|&off| off > 0.0).count() <= 3, "{actual:?}");
        }
    }

    #[test]
    fn images_are_cropped_in_the_middle_and_normalised() {
        let config = Config { do_resize: false, ..Config::default() };
        let planes = preprocessor(config, 4).planes(&image(3, 7));
        let green: [f32; 16] = [
            -1.752_097_1,
            0.409_021_6,
            1.069_363_4,
            1.729_705_1,
            -1.752_097_1,
            1.774_728_4,
            -1.301_864,
            -0.536_467_85,
            -1.752_097_1,
            -0.701_553_3,
            0.168_897_32,
            1.039_347_8,
            -1.752_097_1,
            0.664_153_64,
            1.639_658_5,
            -1.226_825_2,
        ];
        for (expected, actual) in green.iter().zip(&planes[16..32]) {
            assert!((expected - actual).abs() < 1e-6, "{planes:?}");
        }
    }

    #[test]
    fn strips_are_refused() {
        let preprocessor = preprocessor(Config::default(), 224);
        let error = preprocessor.resized(image(1, 2000)).unwrap_err().to_string();
        assert!(error.contains("cannot resize 1 x 2000 pixels to 224 x 448000"), "{error}");
    }

    #[test]
    fn jpegs_that_end_early_are_noticed() {
        // Start, a segment with an end marker in it, the header of a scan, data, end.
        let jpeg = b"\xff\xd8\xff\xe0\x00\x04\xff\xd9\xff\xff\xda\x00\x02data\xff\x00\xff\xd9";
        assert!(has_end(jpeg));
        (0..jpeg.len()).for_each(|len| assert!(!has_end(&jpeg[..len]), "{len}"));
    }

    #[test]
    fn configurations_that_cannot_be_followed_are_refused() {
        for (json, expected) in [
            (r#"{ "resample": 1 }"#, "resample: expected 2 (bilinear) or 3 (bicubic), got 1"),
            (r#"{ "crop_size": { "shortest_edge": 224 } }"#, "crop_size: expected a number"),
            (r#"{ "image_std": [1.0, 0.0, 1.0] }"#, "image_std: expected numbers other than 0"),
            (r#"{ "size": "big" }"#, "preprocessor_config.json"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("preprocessor_config.json"), json).unwrap();
            let error = Preprocessor::open(dir.path(), 224).err().unwrap().to_string();
            assert!(error.contains(expected) && error.contains("preprocessor_config.json"), "{error}");
        }
        assert!(Preprocessor::open(Path::new("nowhere"), 224).is_err());
    }
}
