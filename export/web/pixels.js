// From an image or a camera frame to a model's input, with exactly the pixels of export/spec.py's transform:
// timm's evaluation transform over torchvision and Pillow. A `spec` has the fields of export/spec.py's Spec.

const MAX_PIXELS = 40_000_000; // of one image; its copies here take 320 MB
const STRIP = 256; // rows that are read at once: a canvas of a whole image is too large for some phones
const BITS = 22; // of Pillow's fixed point: 32 less 8 of a gray level and 2 for sums out of range
const HALF = 1 << (BITS - 1);

/** Pillow's filters: how far they reach, in source pixels at scale 1, and their weight at a distance x ≥ 0. */
const FILTERS = {
  bilinear: { reach: 1, weight: (x) => (x < 1 ? 1 - x : 0) },
  bicubic: { // Keys' with a = -0.5
    reach: 2,
    weight: (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0),
  },
};

/** [height, width] of a size in JSON, which is one number for a square. */
export const sidesOf = (size) => (Array.isArray(size) ? size : [size, size]);

/** To the nearest integer, halves to the even one, as Python rounds; x ≥ 0. */
const round = (x) => {
  const up = Math.round(x);
  return up - x === 0.5 && up % 2 ? up - 1 : up;
};

const choose = (what, table, name) => {
  if (Object.hasOwn(table, name)) return table[name];
  throw new Error(`${what} '${name}' is not known; choose from ${Object.keys(table).join(", ")}`);
};

// --- reading ------------------------------------------------------------------------------------------------------

/**
 * The pixels of a file (Blob) or of a video's present frame, at full resolution.
 *
 * As open_image in train/data/images.py, it turns an image upright as its Exif data says, composites what is transparent
 * on white, divides 16 bits by 256, takes the first frame, and applies no color profile.
 *
 * @returns {Promise<ImageData>}
 * @throws {Error} The file is no image, or has more than `MAX_PIXELS`; or the video has no frame yet.
 */
export async function readImage(source) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(source, options).catch((error) => {
    throw new Error(source instanceof Blob
      ? `${source.name ?? "the file"}: not a readable image (${error.message}); choose a JPEG, PNG or WebP`
      : `the camera gives no frame (${error.message}); wait for it, or start it again`);
  });
  try {
    const { width, height } = bitmap;
    if (width * height > MAX_PIXELS)
      throw new Error(`${source.name ?? "the image"}: ${width}×${height} pixels are more than the `
        + `${MAX_PIXELS / 1e6} million allowed; choose a smaller one`);
    const image = new ImageData(width, height);
    const canvas = new OffscreenCanvas(width, Math.min(STRIP, height));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    for (let top = 0; top < height; top += STRIP) {
      context.fillRect(0, 0, width, STRIP);
      context.drawImage(bitmap, 0, -top);
      const rows = Math.min(STRIP, height - top);
      image.data.set(context.getImageData(0, 0, width, rows).data, 4 * width * top);
    }
    return image;
  } finally {
    bitmap.close();
  }
}

// --- resizing and cropping ----------------------------------------------------------------------------------------

/**
 * The part of an image that a model of `spec` sees, resized and cropped as Spec.transform does it, bit for bit.
 *
 * @param {{data: Uint8ClampedArray, width: number, height: number}} image RGBA; A is not looked at.
 * @returns {Uint8Array} (H, W, C)
 * @throws {Error} The spec asks for what is not known here, or the image is so narrow that nothing is left of it.
 */
export function cut(image, spec) {
  const { in_chans: chans } = spec;
  const [rows, columns] = sidesOf(spec.img_size);
  const filter = choose("interpolation", FILTERS, spec.interpolation);
  const [width, height] = resizedTo(image, spec);
  const x = axis(image.width, width, columns, filter);
  const y = axis(image.height, height, rows, filter);
  const pixels = new Uint8ClampedArray(3 * rows * columns);
  if (spec.crop_mode === "border") {
    const fill = spec.mean.map((mean) => round(255 * mean));
    for (let i = 0; i < pixels.length; i++) pixels[i] = fill[i % chans];
  }

  const data = chans === 1 ? gray(image.data) : image.data;
  const whole = { data, row: 4 * image.width, column: 4 };
  const source = within(whole, y.first, x.first);
  const target = within({ data: pixels, row: 3 * columns, column: 3 }, y.margin, x.margin);
  const lost = image.height - height;
  if (lost > 0 && lost > 2 * (image.width - width)) { // Pillow's order since 13.0; until 12 it was always the other
    const between = blank(y.shown, x.seen);
    pass(turned(source), turned(between), x.seen, y);
    pass(between, target, y.shown, x);
  } else {
    const between = blank(y.seen, x.shown);
    pass(source, between, y.seen, x);
    pass(turned(between), turned(target), x.shown, y);
  }
  return new Uint8Array(chans === 3 ? pixels.buffer : pixels.filter((_, i) => i % 3 === 0));
}

/** Width and height of the whole image when resized, of which the crop is then taken. */
function resizedTo({ width, height }, { img_size: size, crop_pct: pct, crop_mode: mode }) {
  const [rows, columns] = sidesOf(size).map((side) => Math.floor(side / pct));
  const [shorter, longer] = width <= height ? [width, height] : [height, width];
  const ratios = [width / columns, height / rows];
  const by = (ratio) => [round(width / ratio), round(height / ratio)];
  const shorterTo = (side) => [width, height].map((each) => (each === shorter ? side : Math.trunc((side * longer) / shorter)));
  const sizes = {
    center: () => (rows === columns ? shorterTo(rows) : by(Math.min(...ratios))),
    squash: () => [columns, rows],
    border: () => by(Math.max(...ratios)),
  };
  const resized = choose("crop mode", sizes, mode)();
  if (!Math.min(...resized)) throw new Error(`an image of ${width}×${height} pixels is too narrow; choose another one`);
  return resized;
}

/**
 * How one side of the image becomes one side of the crop: `shown` samples, behind `margin` that are left empty, each
 * the sum of `counts[i]` source samples from `starts[i]` on, times `weights` from `i * taps` on. Starts are counted
 * from `first`, the first of the `seen` source samples that are needed at all.
 *
 * @param {number} from Length of the side in the source; @param {number} to and resized; @param {number} size cropped.
 */
function axis(from, to, size, { reach, weight }) {
  const scale = from / to;
  const stretch = Math.max(scale, 1); // of the filter, which takes in all of the source when that gets smaller
  const support = reach * stretch;
  const taps = 2 * Math.ceil(support) + 1;
  const shown = Math.min(to, size);
  const cropped = to > size ? round((to - size) / 2) : 0;
  const starts = new Int32Array(shown);
  const counts = new Int32Array(shown);
  const weights = new Int32Array(shown * taps);
  for (let i = 0; i < shown; i++) {
    const center = (cropped + i + 0.5) * scale;
    starts[i] = Math.max(0, Math.trunc(center - support + 0.5));
    counts[i] = Math.min(from, Math.trunc(center + support + 0.5)) - starts[i];
    const raw = Array.from({ length: counts[i] }, (_, tap) =>
      weight(Math.abs((starts[i] + tap - center + 0.5) * (1 / stretch))));
    const sum = raw.reduce((a, b) => a + b, 0);
    raw.forEach((value, tap) => {
      const fixed = (value / sum) * 2 ** BITS;
      weights[i * taps + tap] = Math.trunc(fixed + (fixed < 0 ? -0.5 : 0.5));
    });
  }
  const first = starts[0];
  const seen = starts[shown - 1] + counts[shown - 1] - first;
  return { starts: starts.map((start) => start - first), counts, weights, taps, shown, first, seen,
    margin: Math.floor((size - shown) / 2) };
}

// Where a channel of an image is: data[top * row + left * column + channel].
const within = ({ data, row, column }, top, left) =>
  ({ data: data.subarray(top * row + left * column), row, column });
const turned = ({ data, row, column }) => ({ data, row: column, column: row });
const blank = (height, width) => ({ data: new Uint8ClampedArray(3 * height * width), row: 3 * width, column: 3 });

/** Resizes the rows of `source` into those of `target`, whose clamping does Pillow's clipping to 0–255. */
function pass(source, target, rows, { starts, counts, weights, taps, shown }) {
  const { data, column } = source;
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < shown; i++) {
      const end = i * taps + counts[i];
      let at = row * source.row + starts[i] * column;
      let red = HALF, green = HALF, blue = HALF;
      for (let tap = i * taps; tap < end; tap++, at += column) {
        const weight = weights[tap];
        red = (red + Math.imul(data[at], weight)) | 0;
        green = (green + Math.imul(data[at + 1], weight)) | 0;
        blue = (blue + Math.imul(data[at + 2], weight)) | 0;
      }
      const to = row * target.row + i * target.column;
      target.data[to] = red >> BITS;
      target.data[to + 1] = green >> BITS;
      target.data[to + 2] = blue >> BITS;
    }
  }
}

/** RGBA → the same gray level four times over, as Pillow converts to "L". */
function gray(rgba) {
  const levels = new Uint32Array(rgba.length / 4);
  for (let i = 0; i < levels.length; i++) {
    const level = (19595 * rgba[4 * i] + 38470 * rgba[4 * i + 1] + 7471 * rgba[4 * i + 2] + 0x8000) >> 16;
    levels[i] = 0x01010101 * level; // in any order of bytes
  }
  return new Uint8ClampedArray(levels.buffer);
}

// --- normalizing --------------------------------------------------------------------------------------------------

/**
 * Returns Spec.normalize of the pixels from `cut`, in float32 as torch computes it.
 *
 * @returns {Float32Array} (C, H, W)
 */
export function normalize(pixels, { in_chans: chans, mean, std }) {
  const { fround } = Math;
  const levels = mean.map((_, c) => Float32Array.from({ length: 256 }, (_, level) =>
    fround(fround(level / 255) - fround(mean[c])) / fround(std[c])));
  const plane = pixels.length / chans;
  const values = new Float32Array(pixels.length);
  for (let c = 0; c < chans; c++)
    for (let i = 0; i < plane; i++) values[c * plane + i] = levels[c][pixels[i * chans + c]];
  return values;
}
