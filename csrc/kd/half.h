// SPDX-License-Identifier: Apache-2.0
// The 16-bit floating-point formats as bits. Included inside a namespace, after its KD_FN.

KD_FN float from_bits(uint32_t x) {
  float f;
  __builtin_memcpy(&f, &x, 4);
  return f;
}
KD_FN uint32_t to_bits(float f) {
  uint32_t x;
  __builtin_memcpy(&x, &f, 4);
  return x;
}
KD_FN float from_bfloat16(uint16_t h) { return from_bits((uint32_t)h << 16); }
KD_FN uint16_t to_bfloat16(float f) {
  const uint32_t x = to_bits(f);
  return f != f ? 0x7fc0 : (uint16_t)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}
KD_FN float from_float16(uint16_t h) {
  uint32_t x = (uint32_t)(h & 0x7fff) << 13;
  const uint32_t exponent = x & (0x7c00 << 13);
  x += (127 - 15) << 23;
  x += exponent == (0x7c00 << 13) ? (128 - 16) << 23 : 0;
  const float subnormal = from_bits(x + (1 << 23)) - from_bits(113 << 23);
  const float f = exponent == 0 ? subnormal : from_bits(x);
  return from_bits(to_bits(f) | (uint32_t)(h & 0x8000) << 16);
}
KD_FN uint16_t to_float16(float f) {  // to nearest even
  uint32_t x = to_bits(f);
  const uint32_t sign = x & 0x80000000u;
  x ^= sign;
  const uint32_t large = x > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t subnormal = to_bits(from_bits(x) + 0.5f) - to_bits(0.5f);
  const uint32_t normal = (x + ((uint32_t)(15 - 127) << 23) + 0xfff + ((x >> 13) & 1)) >> 13;
  const uint32_t h = x >= (143u << 23) ? large : x < (113u << 23) ? subnormal : normal;
  return (uint16_t)(h | sign >> 16);
}
