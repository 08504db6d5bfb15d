// The product of weights with the few rows of a step, on compute capability 9.0.
#pragma once

#include "common/begin.h"
#include "elastic_cache/linear.h"

namespace elastic_cache::cuda {

// Up to so many rows torch's products are no faster [an H100, microseconds for the four products of
// a LLaDA-8B layer, ours and torch's: 193 and 213 at 192 rows, 207 and 206 at 208, 221 and 213 at
// 256].
inline constexpr int64_t kStreamRows = 192;

// The same of the gated form, which saves a kernel [an H200, a layer with torch's product and
// swiglu, and with the gated form: 188 and 190 at 208 rows, 215 and 210 at 240, 230 and 226 at
// 256].
inline constexpr int64_t kGatedStreamRows = 256;

// Whether there is a form for these params: bfloat16 rows on compute capability 9.0, sizes that are
// multiples of 64, and everything aligned.
bool can_stream(const LinearParams& params);

// Computes linear(params) for any number of rows, or returns false where there is no form. A row's
// result does not depend on the others, nor on how many there are.
// The subtle thing: where it may begin early it reads `weight` before earlier work in the stream
// has ended. Then no kernel of this library that is still pending may write it.
bool stream_linear(const LinearParams& params, Begin begin, Stream stream);

// The same, early, of linear(gate_up) and swiglu after it, -> `out` [R, N / 2]; gate_up.out is not
// written.
bool stream_gated_linear(const LinearParams& gate_up, void* out, Stream stream);

}  // namespace elastic_cache::cuda
