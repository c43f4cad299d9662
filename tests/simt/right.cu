// SPDX-License-Identifier: Apache-2.0
// Each primitive of kd/cuda/device.h, used as it should be: under the simulator and on a GPU.
#include <math.h>

#include "harness.h"

KD_KERNEL(64, 1) void indices_kernel(int* out) {
  const int i = block_index() * block_threads() + thread_index();
  out[i] = (cluster_rank() * 10 + warp_index()) * 100 + lane_index();
  if (i == 0) out[grid_blocks() * block_threads()] = grid_blocks();
}
void indices() {
  Array<int> out(6 * 64 + 1);
  launch(indices_kernel, Launch{"indices", 6, 64, 2}, out);
  const std::vector<int> is = out.read();
  for (int i = 0; i < 6 * 64; i++)
    expect_equal(is[i], (i / 64 % 2 * 10 + i % 64 / 32) * 100 + i % 32, "index");
  expect_equal(is[6 * 64], 6, "number of blocks");
}

KD_KERNEL(64, 1) void warps_kernel(double* out) {
  const int lane = lane_index();
  int wrong = 0;
  wrong += shuffle_xor((float)lane, 5) != (float)(lane ^ 5);
  wrong += shuffle_xor((int64_t)lane << 40, 1) != (int64_t)(lane ^ 1) << 40;
  wrong += vote_bits(lane % 3 == 0) != 0x49249249u;
  double sum = lane;
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  out[thread_index()] = wrong ? -wrong : sum;
}
void warps() {
  Array<double> out(64);
  launch(warps_kernel, Launch{"warps", 1, 64}, out);
  for (double x : out.read()) expect_equal(x, 496., "sum");
}

// Sums through shared memory: of a warp's lanes, then of the block's warps, in a fixed order.
KD_KERNEL(256, 1) void block_kernel(const float* in, float* out) {
  SharedMemory memory = shared_memory();
  Shared<float> values = memory.take<float>(256), sums = memory.take<float>(8);
  const int i = thread_index(), warp = warp_index();
  values[i] = in[i];
  sync_warp();
  if (lane_index() == 0) {
    float sum = 0;
    for (int j = 0; j < 32; j += 4) {
      const Pack<float, 4> four = values.pack<4>(32 * warp + j);
      for (float v : four.values) sum += v;
    }
    sums[warp] = sum;
  }
  sync_block();
  float total = 0;
  for (int w = 0; w < 8; w++) total += sums[w];
  out[i] = total;
}
void block() {
  std::vector<float> x(256);
  for (int i = 0; i < 256; i++) x[i] = (float)i;
  Array<float> in(x), out(256);
  SharedMemory size;
  size.take<float>(256), size.take<float>(8);
  launch(block_kernel, Launch{"block", 1, 256, 1, size.bytes()}, in, out);
  for (float x : out.read()) expect_equal(x, 255 * 128.f, "sum");
}

KD_KERNEL(64, 1) void cluster_kernel(int* out) {
  SharedMemory memory = shared_memory();
  Shared<int> mine = memory.take<int>(64);
  mine[thread_index()] = 1000 * cluster_rank() + thread_index();
  sync_cluster();
  int sum = 0;
  for (int rank = 0; rank < 8; rank++) sum += remote(mine, rank)[63 - thread_index()];
  out[block_index() * 64 + thread_index()] = sum;
  sync_cluster();  // until nobody reads here any more
}
void cluster() {
  Array<int> out(16 * 64);
  launch(cluster_kernel, Launch{"cluster", 16, 64, 8, 256}, out);
  const std::vector<int> is = out.read();
  for (int i = 0; i < 16 * 64; i++) expect_equal(is[i], 28000 + 8 * (63 - i % 64), "sum");
  const int64_t at_once = resident(cluster_kernel, Launch{"cluster", 8, 64, 8, 256});
  expect(at_once >= 8 && at_once % 8 == 0, "whole clusters at once");
}

// One thread copies pieces into a ring of two, all sum them.
constexpr int piece = 256, pieces = 7, stages = 2;
KD_KERNEL(128, 1) void bulk_kernel(const bfloat16* in, float* out) {
  SharedMemory memory = shared_memory();
  Shared<bfloat16> ring = memory.take<bfloat16>(stages * piece);
  Shared<float> sums = memory.take<float>(128);
  Barriers full = memory.barriers(stages);
  if (thread_index() == 0) {
    for (int s = 0; s < stages; s++) full[s].init(1);
    fence_barriers();
  }
  const auto ask = [&](int k) {
    if (thread_index() != 0 || k >= pieces) return;
    const int s = k % stages;
    full[s].arrive_expecting(piece * sizeof(bfloat16));
    copy_async(ring.slice(s * piece, piece), in + k * piece, piece, full[s]);
  };
  for (int k = 0; k < stages; k++) ask(k);
  sync_block();
  float sum = 0;
  for (int k = 0; k < pieces; k++) {
    const int s = k % stages;
    full[s].wait(k / stages & 1);
    for (int i = thread_index(); i < piece; i += block_threads())
      sum += to_float(ring[s * piece + i]);
    sync_block();
    ask(k + stages);
  }
  sums[thread_index()] = sum;
  sync_block();
  if (thread_index() == 0) {
    for (int i = 1; i < block_threads(); i++) sum += sums[i];
    *out = sum;
  }
}
void bulk() {
  std::vector<bfloat16> x(piece * pieces);
  for (int i = 0; i < piece * pieces; i++) x[i].bits = i / piece % 2 ? 0x4000 : 0x3f80;  // 2, 1
  Array<bfloat16> in(x);
  Array<float> out(1);
  launch(bulk_kernel, Launch{"bulk", 1, 128, 1, stages * piece * 2 + 512 + 16}, in, out);
  expect_equal(out.read()[0], piece * 10.f, "sum");
}

// In place: what was written there is overwritten by a copy.
KD_KERNEL(64, 1) void fenced_kernel(const float* in, float* out) {
  SharedMemory memory = shared_memory();
  Shared<float> a = memory.take<float>(64);
  Barriers barrier = memory.barriers(1);
  a[thread_index()] = -1;
  fence_async();
  if (thread_index() == 0) {
    barrier[0].init(1);
    fence_barriers();
  }
  sync_block();
  if (thread_index() == 0) {
    barrier[0].arrive_expecting(64 * sizeof(float));
    copy_async(a, in, 64, barrier[0]);
  }
  barrier[0].wait(0);
  out[thread_index()] = a[63 - thread_index()];
}
void fenced() {
  std::vector<float> x(64);
  for (int i = 0; i < 64; i++) x[i] = (float)i;
  Array<float> in(x), out(64);
  launch(fenced_kernel, Launch{"fenced", 1, 64, 1, 256 + 16}, in, out);
  const std::vector<float> is = out.read();
  for (int i = 0; i < 64; i++) expect_equal(is[i], 63.f - i, "copy");
}

// The last block to come adds up what all have written.
KD_KERNEL(32, 1) void last_kernel(int* parts, int* arrived, int* out) {
  if (thread_index() == 0) {
    parts[block_index()] = block_index();
    fence_device();
    if (atomic_add(arrived, 1) == grid_blocks() - 1) {
      fence_device();
      for (int i = 0; i < grid_blocks(); i++) *out += ((volatile int*)parts)[i];
    }
  }
}
void last() {
  Array<int> parts(20), arrived(1), out(1);
  launch(last_kernel, Launch{"last", 20, 32}, parts, arrived, out);
  expect_equal(out.read()[0], 190, "sum");
}

KD_KERNEL(32, 1) void memory_kernel(const float16* in, float16* out) {
  const int i = thread_index();
  store_once(out + 8 * i, load<8>(in + 8 * i));
  store_once(out + 256 + 4 * i, load<4>(in + 4 * i));
  store_once(out + 384 + i, load<1>(in + 1 + i));
}
void memory() {
  std::vector<float16> x(256);
  for (int i = 0; i < 256; i++) x[i].bits = (uint16_t)i;
  Array<float16> in(x), out(416);
  launch(memory_kernel, Launch{"memory", 1, 32}, in, out);
  const std::vector<float16> is = out.read();
  for (int i = 0; i < 416; i++)
    expect_equal<int>(is[i].bits, i < 256 ? i : i < 384 ? i - 256 : i - 383, "element");
}

// Every 16-bit number there and back, and what lies half-way to the next.
template <class T>
KD_KERNEL(256, 1) void formats_kernel(uint16_t* same, uint16_t* half) {
  const int i = block_index() * 256 + thread_index();
  const T x{(uint16_t)i}, next{(uint16_t)(i + 1)};
  same[i] = from_float<T>(to_float(x)).bits;
  half[i] = from_float<T>(0.5f * to_float(x) + 0.5f * to_float(next)).bits;
}
template <class T>
void format(int infinity) {
  Array<uint16_t> same(65536), half(65536);
  launch(formats_kernel<T>, Launch{"formats", 256, 256}, same, half);
  const std::vector<uint16_t> x = same.read(), h = half.read();
  for (int i = 0; i < 65536; i++) {
    const int magnitude = i & 0x7fff;
    if (magnitude <= infinity) expect_equal<int>(x[i], i, "number");
    else expect((x[i] & 0x7fff) > infinity, "a NaN");
    if (magnitude < infinity - 1) expect_equal<int>(h[i], i + (i & 1), "half-way");
  }
}
void formats() {
  format<bfloat16>(0x7f80);
  format<float16>(0x7c00);
}

KD_KERNEL(32, 1) void extremes_kernel(const float* in, int n, float* out) {
  const float a = in[lane_index() / n % n], b = in[lane_index() % n];
  float* to = out + 6 * lane_index();
  to[0] = larger(a, b), to[1] = smaller(a, b);
  to[2] = larger_or_nan(a, b), to[3] = smaller_or_nan(a, b);
  to[4] = (float)larger((double)a, (double)b), to[5] = (float)smaller((double)a, (double)b);
}
void extremes() {
  const std::vector<float> x = {-INFINITY, -1, 2, INFINITY, NAN};
  Array<float> in(x), out(6 * 32);
  launch(extremes_kernel, Launch{"extremes", 1, 32}, in, 5, out);
  const std::vector<float> y = out.read();
  for (int i = 0; i < 25; i++) {
    const float a = x[i / 5], b = x[i % 5];
    for (int j = 0; j < 6; j++) {
      const float one = j % 2 ? fminf(a, b) : fmaxf(a, b);
      const bool nan = isnan(one) || ((j == 2 || j == 3) && (isnan(a) || isnan(b)));
      expect(nan ? isnan(y[6 * i + j]) : y[6 * i + j] == one, "larger or smaller");
    }
  }
}

KD_KERNEL(256, 1) void powers_kernel(const float* in, float* out) {
  const int i = block_index() * 256 + thread_index();
  out[i] = exp2_approx(in[i]);
}
void powers() {
  std::vector<float> x(4096);
  for (int i = 0; i < 4096; i++) x[i] = (i - 2047.5f) / 17;
  x[0] = -INFINITY;
  x[1] = 200;
  x[2] = -200;
  Array<float> in(x), out(4096);
  launch(powers_kernel, Launch{"powers", 16, 256}, in, out);
  const std::vector<float> y = out.read();
  expect(y[0] == 0 && y[1] == INFINITY && y[2] == 0, "limits of exp2");
  for (int i = 3; i < 4096; i++) {
    const double should = exp2((double)x[i]);
    expect(fabs(y[i] - should) <= should * ldexp(1, -22), "power of " + std::to_string(x[i]));
  }
}

int main(int argc, char** argv) {
  return run_cases(
      {
          {"indices", indices}, {"warps", warps}, {"block", block}, {"cluster", cluster},
          {"bulk", bulk}, {"fenced", fenced}, {"last", last}, {"memory", memory},
          {"formats", formats}, {"extremes", extremes}, {"powers", powers},
      },
      argc, argv);
}
