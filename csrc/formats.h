// How weights are held: one struct per format, each knowing its blocks and how they decode.
//
// A row of `width` weights is `width / kBlock` blocks of `kBytes` bytes. The formats of GGUF files
// are byte for byte as in the file (github.com/ggml-org/ggml, ggml-common.h and ggml-quants.c);
// int8 and int4 have 16 bits per 32 weights in an array of their own: the scale of int8 in bfloat16,
// a scale and a zero point of int4.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace gemlax {

inline uint16_t load16(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline float from_float16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00)  // infinite, or not a number
    return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) {  // subnormal: an integer times 2^-24
    const float small = float(rest) * 0x1p-24f;
    return sign ? -small : small;
  }
  return std::bit_cast<float>(sign | ((rest << 13) + ((127 - 15) << 23)));
}

inline float load_float16(const uint8_t* p) { return from_float16(load16(p)); }

// A number of a cache or a weight of plain numbers.
inline float to_float(float x) { return x; }
inline float to_float(uint16_t bits) { return from_bfloat16(bits); }

// `scales` is that of the block's first group where a format has an array of them.
struct Float32 {
  using Number = float;
  static constexpr int kBlock = 1, kBytes = 4, kGroup = 0;
  static void decode(const uint8_t* block, const uint16_t*, float* out) {
    std::memcpy(out, block, 4);
  }
};

struct BFloat16 {
  using Number = uint16_t;
  static constexpr int kBlock = 1, kBytes = 2, kGroup = 0;
  static void decode(const uint8_t* block, const uint16_t*, float* out) {
    *out = from_bfloat16(load16(block));
  }
};

struct Int8 {
  static constexpr int kBlock = 32, kBytes = 32, kGroup = 32;
  static void decode(const uint8_t* block, const uint16_t* scales, float* out) {
    const float scale = from_bfloat16(*scales);
    for (int i = 0; i < 32; ++i) out[i] = scale * float(int8_t(block[i]));
  }
};

// Byte i holds the code of weight i in its low half and that of weight i + 16 in its high half.
// weight = scale * (code - zero): the lower 9 bits of a group's entry are those of a float16 below 2
// from its highest exponent bit but one on, the upper 7 are the zero point in eighths.
struct Int4 {
  static constexpr int kBlock = 32, kBytes = 16, kGroup = 32;
  static constexpr int kScaleBits = 9, kScaleShift = 5, kScaleMask = (1 << kScaleBits) - 1;
  static constexpr float kZeroStep = 0.125f;
  static float scale(uint16_t entry) {
    return from_float16(uint16_t((entry & kScaleMask) << kScaleShift));
  }
  static float zero(uint16_t entry) { return kZeroStep * float(entry >> kScaleBits); }
  static void decode(const uint8_t* block, const uint16_t* entry, float* out) {
    const float group_scale = scale(*entry), group_zero = zero(*entry);
    for (int i = 0; i < 16; ++i) {
      out[i] = group_scale * (float(block[i] & 15) - group_zero);
      out[i + 16] = group_scale * (float(block[i] >> 4) - group_zero);
    }
  }
};

struct Q8_0 {
  static constexpr int kBlock = 32, kBytes = 34, kGroup = 0;
  static void decode(const uint8_t* block, const uint16_t*, float* out) {
    const float scale = load_float16(block);
    for (int i = 0; i < 32; ++i) out[i] = scale * float(int8_t(block[2 + i]));
  }
};

struct Q4_0 {
  static constexpr int kBlock = 32, kBytes = 18, kGroup = 0;
  static void decode(const uint8_t* block, const uint16_t*, float* out) {
    const float scale = load_float16(block);
    for (int i = 0; i < 16; ++i) {
      out[i] = scale * float((block[2 + i] & 15) - 8);
      out[i + 16] = scale * float((block[2 + i] >> 4) - 8);
    }
  }
};

// scale, 32 fifth bits, 16 bytes of two low halves.
struct Q5_0 {
  static constexpr int kBlock = 32, kBytes = 22, kGroup = 0;
  static void decode(const uint8_t* block, const uint16_t*, float* out) {
    const float scale = load_float16(block);
    uint32_t high;
    std::memcpy(&high, block + 2, 4);
    for (int i = 0; i < 16; ++i) {
      const int low = block[6 + i] & 15, top = block[6 + i] >> 4;
      out[i] = scale * float((low | int(high >> i & 1) << 4) - 16);
      out[i + 16] = scale * float((top | int(high >> (i + 16) & 1) << 4) - 16);
    }
  }
};

// Scale and minimum of groups of 32, 6 bits each, times one scale of scales and one of minima.
struct Q4_K {
  static constexpr int kBlock = 256, kBytes = 144, kGroup = 0;
  static void scale_and_minimum(const uint8_t* packed, int group, int* scale, int* minimum) {
    if (group < 4) {
      *scale = packed[group] & 63;
      *minimum = packed[group + 4] & 63;
    } else {
      *scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4;
      *minimum = (packed[group + 4] >> 4) | (packed[group] >> 6) << 4;
    }
  }
  static void decode(const uint8_t* block, const uint16_t*, float* out) {
    const float d = load_float16(block), dmin = load_float16(block + 2);
    for (int group = 0; group < 8; ++group) {
      int scale, minimum;
      scale_and_minimum(block + 4, group, &scale, &minimum);
      const uint8_t* codes = block + 16 + 32 * (group / 2);
      for (int i = 0; i < 32; ++i) {
        const int code = group % 2 ? codes[i] >> 4 : codes[i] & 15;
        out[32 * group + i] = d * float(scale) * float(code) - dmin * float(minimum);
      }
    }
  }
};

// 128 bytes of low halves, 64 of upper pairs of bits, 16 scales of 16 weights, their scale.
struct Q6_K {
  static constexpr int kBlock = 256, kBytes = 210, kGroup = 0;
  static void decode(const uint8_t* block, const uint16_t*, float* out) {
    const float d = load_float16(block + 208);
    for (int i = 0; i < 256; ++i) {
      const int half = i / 128, quarter = i % 128 / 32, byte = i % 32;
      const uint8_t low = block[64 * half + 32 * (quarter % 2) + byte];
      const uint8_t high = block[128 + 32 * half + byte];
      const int code = (quarter < 2 ? low & 15 : low >> 4) | (high >> (2 * quarter) & 3) << 4;
      const int scale = int8_t(block[192 + i / 16]);
      out[i] = d * float(scale) * float(code - 32);
    }
  }
};

// Every format, in the order of its number: its name in Python, and its struct.
#define GEMLAX_FORMATS(X)                                                             \
  X(float32, Float32) X(bfloat16, BFloat16) X(int8, Int8) X(int4, Int4) X(q8_0, Q8_0) \
  X(q4_0, Q4_0) X(q5_0, Q5_0) X(q4_k, Q4_K) X(q6_k, Q6_K)

#define GEMLAX_NUMBER(name, F) k##F,
enum Format : int64_t { GEMLAX_FORMATS(GEMLAX_NUMBER) kFormats };

struct FormatFacts {
  int block, bytes, group;  // weights and bytes of a block; weights per entry of `scales`, or 0
  bool plain;               // numbers, not codes
  void (*decode)(const uint8_t* block, const uint16_t* scales, float* out);
};

#define GEMLAX_FACTS(name, F) {F::kBlock, F::kBytes, F::kGroup, F::kBlock == 1, F::decode},
inline constexpr FormatFacts kFormatFacts[kFormats] = {GEMLAX_FORMATS(GEMLAX_FACTS)};

}  // namespace gemlax
