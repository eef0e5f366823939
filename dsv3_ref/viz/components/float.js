// Eight-bit floating point as in chapter 09: rounding to nearest, ties to even, saturation.

/** What the bits of a format mean; E4M3 has no infinity, and its largest pattern is no number. */
export const FORMATS = {
  E4M3: { exponentBits: 4, mantissaBits: 3, bias: 7, max: 448 },
  E5M2: { exponentBits: 5, mantissaBits: 2, bias: 15, max: 57344 },
};

/** Return { sign, exponent, mantissa } of a byte, as integers. */
export function fields(byte, { mantissaBits }) {
  return { sign: byte >> 7, exponent: (byte & 127) >> mantissaBits, mantissa: byte & ((1 << mantissaBits) - 1) };
}

/** Return the value of a byte; NaN or an infinity if the pattern stands for one. */
export function decode(byte, format) {
  const { sign, exponent, mantissa } = fields(byte, format), scale = 1 << format.mantissaBits;
  const isSubnormal = exponent === 0;
  const size = 2 ** ((isSubnormal ? 1 : exponent) - format.bias) * ((isSubnormal ? 0 : 1) + mantissa / scale);
  const value = sign ? -size : size;
  if (size <= format.max) return value;
  const isInfinity = format === FORMATS.E5M2 && mantissa === 0;
  return isInfinity ? value * Infinity : NaN;
}

/**
 * Return the byte of the nearest value; what is larger than the maximum becomes the maximum.
 * Subnormal numbers, and values rounded up to the next power of two, follow from the addition.
 */
export function encode(value, format) {
  const sign = value < 0 || Object.is(value, -0) ? 128 : 0;
  const size = Math.min(Math.abs(value), format.max), low = 1 - format.bias;
  const power = Math.max(low, size > 0 ? Math.floor(Math.log2(size)) : low);
  const step = 2 ** (power - format.mantissaBits);
  const digits = roundEven(size / step), leading = 1 << format.mantissaBits;
  return sign | (((power + format.bias) << format.mantissaBits) + digits - leading);
}

/** Round to the nearest integer, from the middle to the even one. */
function roundEven(x) {
  const floor = Math.floor(x), rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}

/** Quantize values in tiles of this many: each tile's largest value becomes 448. */
export function quantize(values, tile) {
  const bytes = [], scales = [];
  for (let start = 0; start < values.length; start += tile) {
    const part = values.slice(start, start + tile);
    const scale = Math.fround(Math.max(...part.map(Math.abs), 1e-30) / FORMATS.E4M3.max);
    scales.push(scale);
    bytes.push(...part.map((value) => encode(Math.fround(value / scale), FORMATS.E4M3)));
  }
  return { bytes, scales };
}
