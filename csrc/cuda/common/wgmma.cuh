// Matrix products of a warpgroup (compute capability 9.0 exactly: sm_90a). Four warps multiply 64
// rows of `a`, which a warp holds as the A fragments of mma.cuh, 16 rows each, with an operand in
// shared memory; results lie as C fragments, eight columns a group.
//
// The operand in shared memory is cut into blocks of 64 columns: 128 bytes a row, groups of eight
// rows 1024 bytes apart and aligned to as much, the 16-byte pieces of row r permuted by r % 8.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace elastic_cache::cuda::wgmma {

constexpr int kBlockColumns = 64;
constexpr int kBlockRowBytes = kBlockColumns * 2;

// Where the 16 bytes from column `column` on of a row are, within blocks `block_bytes` apart.
__device__ __forceinline__ uint32_t swizzled(int row, int column, int block_bytes) {
  const int piece = column % kBlockColumns / 8 ^ row % 8;
  return static_cast<uint32_t>(column / kBlockColumns * block_bytes + row * kBlockRowBytes +
                               piece * 16);
}

// kRows rows of kColumns elements, as products want them.
template <int kRows, int kColumns>
struct alignas(1024) Rows {
  static constexpr int kBlockBytes = kRows * kBlockRowBytes;
  static_assert(kRows % 8 == 0 && kColumns % kBlockColumns == 0);
  unsigned char bytes[kColumns / kBlockColumns * kBlockBytes];

  __device__ unsigned char* at(int row, int column) {
    return bytes + swizzled(row, column, kBlockBytes);
  }
};

// Describes an operand from a shared address on; blocks of 64 columns are kBlockBytes apart.
template <int kBlockBytes>
__device__ __forceinline__ uint64_t operand(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupBytes = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kBlocks = uint64_t{kBlockBytes >> 4} << 16;
  return kSwizzle128 | kGroupBytes | kBlocks | ((shared & 0x3FFFF) >> 4);
}

// A warpgroup leaves itself kCount registers a thread, or waits until it can have as many.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// What this thread wrote to shared memory becomes visible to products after the next barrier.
__device__ __forceinline__ void publish_operands() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Keeps the compiler from moving what reads or writes these registers to the other side.
template <int N>
__device__ __forceinline__ void hold(float (&fragments)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float (&x)[4] = fragments[i];
    asm volatile("" : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3]));
  }
}
template <int N>
__device__ __forceinline__ void hold(uint32_t (&fragments)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    uint32_t (&x)[4] = fragments[i];
    asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3]));
  }
}

__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Products of `a` into `c` may be issued after `begin`; their results are there after `end`.
template <int N, int M>
__device__ __forceinline__ void begin(float (&c)[N][4], uint32_t (&a)[M][4]) {
  hold(c);
  hold(a);
  begin();
}
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int N>
__device__ __forceinline__ void end(float (&c)[N][4]) {
  commit();
  wait<0>();
  hold(c);
}

#define ELASTIC_CACHE_REGISTERS_4(c) "+f"((c)[0]), "+f"((c)[1]), "+f"((c)[2]), "+f"((c)[3])
#define ELASTIC_CACHE_REGISTERS_16(c)                                   \
  ELASTIC_CACHE_REGISTERS_4((c)[0]), ELASTIC_CACHE_REGISTERS_4((c)[1]), \
      ELASTIC_CACHE_REGISTERS_4((c)[2]), ELASTIC_CACHE_REGISTERS_4((c)[3])

// "%0, %1, ..." for so many registers.
#define ELASTIC_CACHE_LIST_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ELASTIC_CACHE_LIST_16 ELASTIC_CACHE_LIST_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ELASTIC_CACHE_LIST_24 ELASTIC_CACHE_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define ELASTIC_CACHE_LIST_32 ELASTIC_CACHE_LIST_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define ELASTIC_CACHE_LIST_40 ELASTIC_CACHE_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define ELASTIC_CACHE_LIST_48 ELASTIC_CACHE_LIST_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define ELASTIC_CACHE_LIST_56 ELASTIC_CACHE_LIST_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define ELASTIC_CACHE_LIST_64 ELASTIC_CACHE_LIST_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define ELASTIC_CACHE_LIST_80 \
  ELASTIC_CACHE_LIST_64       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define ELASTIC_CACHE_LIST_96 \
  ELASTIC_CACHE_LIST_80       \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

// c += a b^T: a 64 x 16, b [8 kGroups][16], its rows those of the blocks.
template <int kGroups>
__device__ __forceinline__ void multiply_transposed(float (&c)[kGroups][4], const uint32_t (&a)[4],
                                                    uint64_t b) {
  static_assert(kGroups == 8);
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{" ELASTIC_CACHE_LIST_32
      "}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
      : ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_16(&c[4])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c += a b: a 64 x 16, b [16][8 kGroups], its rows those of the blocks.
template <int kGroups>
__device__ __forceinline__ void multiply(float (&c)[kGroups][4], const uint32_t (&a)[4],
                                         uint64_t b) {
  static_assert(kGroups == 8 || kGroups == 16);
  if constexpr (kGroups == 8) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{" ELASTIC_CACHE_LIST_32
        "}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_16(&c[4])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{" ELASTIC_CACHE_LIST_64
        "}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_16(&c[4]),
          ELASTIC_CACHE_REGISTERS_16(&c[8]), ELASTIC_CACHE_REGISTERS_16(&c[12])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// A product of operands in shared memory.
#define ELASTIC_CACHE_MULTIPLY(columns, list, at_a, at_b, at_keep, at_transposed, ...) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, " at_keep                             \
               ", 0;\n"                                                                \
               "wgmma.mma_async.sync.aligned.m64n" columns                             \
               "k16.f32.bf16.bf16 "                                                    \
               "{" list "}, " at_a ", " at_b ", p, 1, 1, " at_transposed ", 0;\n}"     \
               : __VA_ARGS__                                                           \
               : "l"(a), "l"(b), "r"(keep), "n"(kTurnsA ? 1 : 0))

// c = keep c + a b^T, keep 0 or 1: a [64][16] and b [8 kGroups][16] in shared memory, their rows
// those of blocks. kTurnsA: c = keep c + a^T b^T, a [16][64].
template <int kGroups, bool kTurnsA = false>
__device__ __forceinline__ void multiply_transposed(float (&c)[kGroups][4], uint64_t a, uint64_t b,
                                                    int keep) {
  if constexpr (kGroups == 2) {
    ELASTIC_CACHE_MULTIPLY("16", ELASTIC_CACHE_LIST_8, "%8", "%9", "%10", "%11",
                           ELASTIC_CACHE_REGISTERS_4(c[0]), ELASTIC_CACHE_REGISTERS_4(c[1]));
  } else if constexpr (kGroups == 4) {
    ELASTIC_CACHE_MULTIPLY("32", ELASTIC_CACHE_LIST_16, "%16", "%17", "%18", "%19",
                           ELASTIC_CACHE_REGISTERS_16(&c[0]));
  } else if constexpr (kGroups == 6) {
    ELASTIC_CACHE_MULTIPLY("48", ELASTIC_CACHE_LIST_24, "%24", "%25", "%26", "%27",
                           ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_4(c[4]),
                           ELASTIC_CACHE_REGISTERS_4(c[5]));
  } else if constexpr (kGroups == 8) {
    ELASTIC_CACHE_MULTIPLY("64", ELASTIC_CACHE_LIST_32, "%32", "%33", "%34", "%35",
                           ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_16(&c[4]));
  } else if constexpr (kGroups == 10) {
    ELASTIC_CACHE_MULTIPLY("80", ELASTIC_CACHE_LIST_40, "%40", "%41", "%42", "%43",
                           ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_16(&c[4]),
                           ELASTIC_CACHE_REGISTERS_4(c[8]), ELASTIC_CACHE_REGISTERS_4(c[9]));
  } else if constexpr (kGroups == 12) {
    ELASTIC_CACHE_MULTIPLY("96", ELASTIC_CACHE_LIST_48, "%48", "%49", "%50", "%51",
                           ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_16(&c[4]),
                           ELASTIC_CACHE_REGISTERS_16(&c[8]));
  } else if constexpr (kGroups == 14) {
    ELASTIC_CACHE_MULTIPLY("112", ELASTIC_CACHE_LIST_56, "%56", "%57", "%58", "%59",
                           ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_16(&c[4]),
                           ELASTIC_CACHE_REGISTERS_16(&c[8]), ELASTIC_CACHE_REGISTERS_4(c[12]),
                           ELASTIC_CACHE_REGISTERS_4(c[13]));
  } else if constexpr (kGroups == 16) {
    ELASTIC_CACHE_MULTIPLY("128", ELASTIC_CACHE_LIST_64, "%64", "%65", "%66", "%67",
                           ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_16(&c[4]),
                           ELASTIC_CACHE_REGISTERS_16(&c[8]), ELASTIC_CACHE_REGISTERS_16(&c[12]));
  } else if constexpr (kGroups == 20) {
    ELASTIC_CACHE_MULTIPLY("160", ELASTIC_CACHE_LIST_80, "%80", "%81", "%82", "%83",
                           ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_16(&c[4]),
                           ELASTIC_CACHE_REGISTERS_16(&c[8]), ELASTIC_CACHE_REGISTERS_16(&c[12]),
                           ELASTIC_CACHE_REGISTERS_16(&c[16]));
  } else {
    static_assert(kGroups == 24);
    ELASTIC_CACHE_MULTIPLY("192", ELASTIC_CACHE_LIST_96, "%96", "%97", "%98", "%99",
                           ELASTIC_CACHE_REGISTERS_16(&c[0]), ELASTIC_CACHE_REGISTERS_16(&c[4]),
                           ELASTIC_CACHE_REGISTERS_16(&c[8]), ELASTIC_CACHE_REGISTERS_16(&c[12]),
                           ELASTIC_CACHE_REGISTERS_16(&c[16]), ELASTIC_CACHE_REGISTERS_16(&c[20]));
  }
}

#undef ELASTIC_CACHE_MULTIPLY
#undef ELASTIC_CACHE_LIST_96
#undef ELASTIC_CACHE_LIST_80
#undef ELASTIC_CACHE_LIST_64
#undef ELASTIC_CACHE_LIST_56
#undef ELASTIC_CACHE_LIST_48
#undef ELASTIC_CACHE_LIST_40
#undef ELASTIC_CACHE_LIST_32
#undef ELASTIC_CACHE_LIST_24
#undef ELASTIC_CACHE_LIST_16
#undef ELASTIC_CACHE_LIST_8
#undef ELASTIC_CACHE_REGISTERS_16
#undef ELASTIC_CACHE_REGISTERS_4

}  // namespace elastic_cache::cuda::wgmma
