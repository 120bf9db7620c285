// Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
// Depth attention on CPUs; cpu.py compiles it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

enum Dtype : int64_t { FLOAT32, BFLOAT16 };

namespace {

// As many numbers at a time as a register holds: what the compiler must split goes through memory.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else  // SSE, NEON
constexpr int64_t LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));

template <class V> V load(const float* from) {
    V values;
    std::memcpy(&values, from, sizeof(V));
    return values;
}

template <class V> void store(float* to, const V& values) { std::memcpy(to, &values, sizeof(V)); }

// Calls body(d, zero) for columns d from `first` on, LANES at a time and the rest one by one; the zero says by its type
// which.
template <class Body> inline void for_columns(int64_t width, Body body, int64_t first = 0) {
    int64_t d = first;
    for (; d + LANES <= width; d += LANES) body(d, Vector{});
    for (; d < width; d++) body(d, 0.0f);
}

typedef float Quad __attribute__((vector_size(16)));

Quad fold(const Vector& values) {
    Quad parts[LANES / 4];
    std::memcpy(parts, &values, sizeof(values));
    for (int64_t k = 1; k < LANES / 4; k++) parts[0] += parts[k];
    return parts[0];
}

// The sums of four times four numbers. One after the other, they would take longer than what they sum in a narrow row.
Quad sums_of(const Quad& a, const Quad& b, const Quad& c, const Quad& d) {
    const Quad ab = Quad{a[0], b[0], a[1], b[1]} + Quad{a[2], b[2], a[3], b[3]};
    const Quad cd = Quad{c[0], d[0], c[1], d[1]} + Quad{c[2], d[2], c[3], d[3]};
    return Quad{ab[0], ab[1], cd[0], cd[1]} + Quad{ab[2], ab[3], cd[2], cd[3]};
}

float from_bfloat16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

uint16_t to_bfloat16(float value) {  // the nearest, of two the even one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7FC0 : uint16_t(rounded);
}

void round_to(Dtype dtype, float* values, int64_t width) {
    if (dtype == FLOAT32) return;
#pragma omp simd
    for (int64_t d = 0; d < width; d++) values[d] = from_bfloat16(to_bfloat16(values[d]));
}

}  // namespace

// A tensor (tokens, width) of one of the dtypes; no tensor if data is null.
struct Rows {
    void* data;
    Dtype dtype;

    explicit operator bool() const { return data != nullptr; }

    // A token's row as float32: where it lies, or in the buffer. The next token's is sent for.
    const float* load(int64_t token, int64_t width, float* buffer) const {
        int64_t bytes = width * (dtype == FLOAT32 ? 4 : 2);
        const char* start = static_cast<const char*>(data) + token * bytes;
        for (int64_t next = bytes; next < 2 * bytes; next += 64) __builtin_prefetch(start + next);
        if (dtype == FLOAT32) return reinterpret_cast<const float*>(start);
        const uint16_t* row = reinterpret_cast<const uint16_t*>(start);
#pragma omp simd
        for (int64_t d = 0; d < width; d++) buffer[d] = from_bfloat16(row[d]);
        return buffer;
    }

    // Where a token's row can be computed: where it lies, or in the buffer.
    float* place(int64_t token, int64_t width, float* buffer) const {
        return dtype == FLOAT32 ? static_cast<float*>(data) + token * width : buffer;
    }

    // Puts into place what has been computed there.
    void store(int64_t token, int64_t width, const float* buffer) const {
        if (dtype == FLOAT32) return;
        uint16_t* row = static_cast<uint16_t*>(data) + token * width;
#pragma omp simd
        for (int64_t d = 0; d < width; d++) row[d] = to_bfloat16(buffer[d]);
    }
};

namespace {

// The loops below take two vectors at a time: their sums don't wait for each other, and what both need is loaded once.

// The dot products of a row with COUNT others, four at most: sums of sums, as in long sums rounding errors grow.
template <int COUNT>
inline void dots(const float* row, const float* const* others, int64_t width, float* results) {
    constexpr int64_t PART = 32 * LANES;
    Quad totals{};
    float rests[COUNT] = {};
    for (int64_t start = 0; start < width; start += PART) {
        const int64_t end = std::min(width, start + PART);
        Vector firsts[COUNT] = {}, seconds[COUNT] = {};
        int64_t d = start;
        for (; d + 2 * LANES <= end; d += 2 * LANES) {
            const Vector first = load<Vector>(row + d), second = load<Vector>(row + d + LANES);
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) {
                firsts[k] += first * load<Vector>(others[k] + d);
                seconds[k] += second * load<Vector>(others[k] + d + LANES);
            }
        }
        for (; d + LANES <= end; d += LANES) {
            const Vector first = load<Vector>(row + d);
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) firsts[k] += first * load<Vector>(others[k] + d);
        }
        for (; d < end; d++) {
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) rests[k] += row[d] * others[k][d];
        }
        Quad folded[4] = {};
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) folded[k] = fold(firsts[k] + seconds[k]);
        totals += sums_of(folded[0], folded[1], folded[2], folded[3]);
    }
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; k++) results[k] = totals[k] + rests[k];
}

void dots(const float* row, const float* const* others, int64_t count, int64_t width, float* results) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) dots<4>(row, others + k, width, results + k);
    if (count - k == 3) dots<3>(row, others + k, width, results + k);
    if (count - k == 2) dots<2>(row, others + k, width, results + k);
    if (count - k == 1) dots<1>(row, others + k, width, results + k);
}

// Where sums of rows may begin: from nothing, or from what is there. They are asked for columns of sum k.
constexpr auto NOTHING = [](int64_t, int64_t, auto zero) { return zero; };

inline auto what_is_in(float* const* sums) {
    return [sums](int64_t k, int64_t d, auto zero) { return load<decltype(zero)>(sums[k] + d); };
}

// COUNT sums of rows, from `first_sum` on. The weight of row i in sum k is weights[i * count + k].
template <int COUNT, class Start>
inline void combine(float* const* all_sums, int64_t first_sum, const float* const* rows, int64_t num_rows,
                    const float* all_weights, int64_t count, int64_t width, Start start) {
    float* const* sums = all_sums + first_sum;
    const float* weights = all_weights + first_sum;
    int64_t d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES) {
        Vector firsts[COUNT], seconds[COUNT];
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) {
            firsts[k] = start(first_sum + k, d, Vector{});
            seconds[k] = start(first_sum + k, d + LANES, Vector{});
        }
        for (int64_t i = 0; i < num_rows; i++) {
            const Vector first = load<Vector>(rows[i] + d), second = load<Vector>(rows[i] + d + LANES);
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) {
                firsts[k] += weights[i * count + k] * first;
                seconds[k] += weights[i * count + k] * second;
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) {
            store(sums[k] + d, firsts[k]);
            store(sums[k] + d + LANES, seconds[k]);
        }
    }
    for_columns(
        width,
        [&](int64_t d, auto zero) {
            using V = decltype(zero);
            V totals[COUNT];
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) totals[k] = start(first_sum + k, d, zero);
            for (int64_t i = 0; i < num_rows; i++) {
                const V value = load<V>(rows[i] + d);
#pragma GCC unroll 4
                for (int k = 0; k < COUNT; k++) totals[k] += weights[i * count + k] * value;
            }
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) store<V>(sums[k] + d, totals[k]);
        },
        d);
}

template <class Start>
void combine(float* const* sums, const float* const* rows, int64_t num_rows, const float* weights, int64_t count,
             int64_t width, Start start) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) combine<4>(sums, k, rows, num_rows, weights, count, width, start);
    if (count - k == 3) combine<3>(sums, k, rows, num_rows, weights, count, width, start);
    if (count - k == 2) combine<2>(sums, k, rows, num_rows, weights, count, width, start);
    if (count - k == 1) combine<1>(sums, k, rows, num_rows, weights, count, width, start);
}

// One sum.
template <class Start>
inline void combine(float* sum, const float* const* rows, int64_t num_rows, const float* weights, int64_t width,
                    Start start) {
    combine<1>(&sum, 0, rows, num_rows, weights, 1, width, start);
}

// e to the power of numbers that aren't above 0, within two units in the last place; of 0 exactly 1.
Vector exponential(const Vector& x) {
    typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
    constexpr float ROUND = 12582912;  // 1.5 * 2^23: in a sum with it, the last bits are the nearest whole number
    const Vector shifted = x * 1.44269504f + ROUND, whole = shifted - ROUND;
    const Vector rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // of x without whole * log 2, in two parts
    // the coefficients are those of Cephes' expf
    Vector series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    const Vector fraction = series * (rest * rest) + rest + 1;
    Integers bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    const Integers power = (bits - 0x4B400000 + 127) << 23;
    Vector factor;
    std::memcpy(&factor, &power, sizeof(factor));
    const Vector result = fraction * factor;
    return x < -87.0f ? Vector{} : result;  // not a number stays that
}

// Room for `count` numbers, in whole vectors.
struct Numbers : std::vector<float> {
    explicit Numbers(int64_t count) : std::vector<float>((count + LANES - 1) / LANES * LANES) {}
    void exponentials() {
        for (size_t k = 0; k < size(); k += LANES) store(data() + k, exponential(load<Vector>(data() + k)));
    }
};

// Of a matrix (rows, columns), turns each column into exponentials of its numbers less the highest, and tells their sums
// and the highest.
void exponentials(Numbers& numbers, int64_t rows, int64_t columns, float* highest, float* sums) {
    float *first = numbers.data(), *last = first + rows * columns;
    for (int64_t column = 0; column < columns; column++) {
        float most = -INFINITY;
        for (float* k = first + column; k < last; k += columns) most = *k > most ? *k : most;
        for (float* k = first + column; k < last; k += columns) *k -= most;
        highest[column] = most;
    }
    numbers.exponentials();
    for (int64_t column = 0; column < columns; column++) {
        float sum = 0;
        for (float* k = first + column; k < last; k += columns) sum += *k;
        sums[column] = sum;
    }
}

float inverse_rms_of(float square_sum, int64_t width, float eps) { return 1 / std::sqrt(square_sum / width + eps); }

// The score of a row, and its inverse RMS.
float score_of(const float* row, const float* product, int64_t width, float eps, float* inverse_rms) {
    const float* others[] = {row, product};
    float results[2];
    dots<2>(row, others, width, results);
    *inverse_rms = inverse_rms_of(results[0], width, eps);
    return results[1] * *inverse_rms;
}

// A row that, times the result, is the row times `factor` and its inverse RMS, the product of which vanishes where the
// row is huge.
const float* times_rms(const float* row, float rms, int64_t width, float* buffer, float* factor) {
    if (rms > 1e-9f) {
        *factor *= rms;
        return row;
    }
    for_columns(width, [&](int64_t d, auto zero) { store(buffer + d, load<decltype(zero)>(row + d) * rms); });
    return buffer;
}

// Fills `normed` with a read times its inverse RMS, rounded to a dtype, times the gain. Returns the inverse RMS.
float normalise(const float* read, const float* gain, float eps, Dtype dtype, const Rows& normed, int64_t token,
                int64_t width, float* buffer) {
    float squares;
    dots<1>(read, &read, width, &squares);
    float inverse_rms = inverse_rms_of(squares, width, eps);
    float* result = normed.place(token, width, buffer);
    if (dtype == FLOAT32) {
        for_columns(width, [&](int64_t d, auto zero) {
            using V = decltype(zero);
            store<V>(result + d, load<V>(read + d) * inverse_rms * load<V>(gain + d));
        });
    } else {
        for (int64_t d = 0; d < width; d++) result[d] = read[d] * inverse_rms;
        round_to(dtype, result, width);
        for (int64_t d = 0; d < width; d++) result[d] *= gain[d];
    }
    normed.store(token, width, result);
    return inverse_rms;
}

// The sum of two rows, rounded as it is stored.
const float* sum_of(const float* a, const float* b, const Rows& sums, int64_t token, int64_t width, float* buffer) {
    float* sum = sums.place(token, width, buffer);
    for_columns(width, [&](int64_t d, auto zero) {
        using V = decltype(zero);
        store<V>(sum + d, load<V>(a + d) + load<V>(b + d));
    });
    round_to(sums.dtype, sum, width);
    sums.store(token, width, sum);
    return sum;
}

// Buffers of one row each, for a thread.
struct Buffers {
    std::vector<float> numbers;
    int64_t width;
    Buffers(int64_t count, int64_t width) : numbers(count * width), width(width) {}
    float* operator[](int64_t index) { return numbers.data() + index * width; }
};

// Half-open ranges of tokens, as many whatever the number of threads, so that sums over them don't depend on it.
struct Range {
    int64_t first, last;
    Range(int64_t index, int64_t ranges, int64_t tokens)
        : first(tokens * index / ranges), last(tokens * (index + 1) / ranges) {}
};

// As many tokens as a cache line has numbers. The numbers of a token lie far apart, often by a power of two, for which a
// cache has few places: so they are moved a line at a time.
constexpr int64_t TILE = 16;

// Numbers of `count` tokens from `first` on: `spread` is (columns, tokens), `together` (count, columns).
void gather(const float* spread, int64_t tokens, int64_t first, int64_t count, int64_t columns, float* together) {
    for (int64_t k = 0; k < columns; k++)
        for (int64_t t = 0; t < count; t++) together[t * columns + k] = spread[k * tokens + first + t];
}

void scatter(float* spread, int64_t tokens, int64_t first, int64_t count, int64_t columns, const float* together) {
    for (int64_t k = 0; k < columns; k++)
        for (int64_t t = 0; t < count; t++) spread[k * tokens + first + t] = together[t * columns + k];
}

// With fewer numbers, starting threads takes longer than the work.
bool is_much(int64_t tokens, int64_t numbers_per_token) { return tokens > 1 && tokens * numbers_per_token > 1 << 15; }

}  // namespace

extern "C" {

void closed_forward(int64_t threads, int64_t tokens, int64_t width, int64_t num_sources, int64_t reads,
                    void* const* sources, Dtype source_dtype, const float* products, double eps, void* const* mixed,
                    Dtype mixed_dtype, float* lse, float* scores, float* inverse_rms) {
#pragma omp parallel num_threads(threads) if (is_much(tokens, width * num_sources))
    {
        const int64_t pairs = num_sources * reads;
        Buffers buffers(num_sources + reads, width);
        Numbers weights(pairs), tile_scores(TILE * pairs), tile_rms(TILE * num_sources), tile_lse(TILE * reads);
        std::vector<float> highest(reads), products_with_row(reads + 1);
        std::vector<const float*> rows(num_sources), others(reads + 1);
        std::vector<float*> results(reads);
        for (int64_t s = 0; s < reads; s++) others[s] = products + s * width;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < tokens; first += TILE) {
            const int64_t count = std::min(TILE, tokens - first);
            for (int64_t token = 0; token < count; token++) {
                const int64_t t = first + token;
                for (int64_t i = 0; i < num_sources; i++) {
                    others[reads] = rows[i] = Rows{sources[i], source_dtype}.load(t, width, buffers[i]);
                    dots(rows[i], others.data(), reads + 1, width, products_with_row.data());
                    const float rms = inverse_rms_of(products_with_row[reads], width, eps);
                    tile_rms[token * num_sources + i] = rms;
                    for (int64_t s = 0; s < reads; s++) weights[i * reads + s] = products_with_row[s] * rms;
                }
                std::copy_n(weights.data(), pairs, tile_scores.data() + token * pairs);
                float* sums = tile_lse.data() + token * reads;
                exponentials(weights, num_sources, reads, highest.data(), sums);
                for (int64_t s = 0; s < reads; s++) {
                    const float factor = 1 / sums[s];
                    for (int64_t k = s; k < pairs; k += reads) weights[k] *= factor;
                    sums[s] = highest[s] + std::log(sums[s]);
                    results[s] = Rows{mixed[s], mixed_dtype}.place(t, width, buffers[num_sources + s]);
                }
                combine(results.data(), rows.data(), num_sources, weights.data(), reads, width, NOTHING);
                for (int64_t s = 0; s < reads; s++) Rows{mixed[s], mixed_dtype}.store(t, width, results[s]);
            }
            scatter(scores, tokens, first, count, pairs, tile_scores.data());
            scatter(inverse_rms, tokens, first, count, num_sources, tile_rms.data());
            scatter(lse, tokens, first, count, reads, tile_lse.data());
        }
    }
}

// `product_sums` is (ranges, reads, width), or null; `given` the gradients of what else the scores go into, or null.
void closed_backward(int64_t threads, int64_t tokens, int64_t width, int64_t num_sources, int64_t reads,
                     void* const* sources, Dtype source_dtype, const float* products, void* const* grad_mixed,
                     Dtype mixed_dtype, const float* lse, const float* grad_lse, const float* scores,
                     const float* inverse_rms, const float* given, void* const* grad_sources, float* product_sums,
                     int64_t ranges) {
#pragma omp parallel num_threads(threads) if (is_much(tokens, width * num_sources))
    {
        const int64_t pairs = num_sources * reads;
        Buffers buffers(2 * num_sources + reads, width);
        Numbers weights(pairs), tile_scores(TILE * pairs), tile_given(TILE * pairs), tile_rms(TILE * num_sources);
        Numbers tile_lse(TILE * reads), tile_grad_lse(TILE * reads);
        std::vector<float> grads(pairs), means(reads), along(num_sources);
        // what the gradients of the sources are sums of: gradients of the reads and products, and their weights
        std::vector<float> part_weights(2 * pairs);
        std::vector<const float*> rows(num_sources), parts(2 * reads);
        std::vector<float*> results(num_sources), sums(reads);
        for (int64_t s = 0; s < reads; s++) parts[reads + s] = products + s * width;
#pragma omp for schedule(static)
        for (int64_t index = 0; index < ranges; index++) {
            Range range(index, ranges, tokens);
            if (product_sums) {
                for (int64_t s = 0; s < reads; s++) sums[s] = product_sums + (index * reads + s) * width;
                std::memset(sums[0], 0, reads * width * sizeof(float));
            }
            for (int64_t t = range.first; t < range.last; t++) {
                const int64_t token = (t - range.first) % TILE;
                if (token == 0) {
                    const int64_t count = std::min(TILE, range.last - t);
                    gather(scores, tokens, t, count, pairs, tile_scores.data());
                    if (given) gather(given, tokens, t, count, pairs, tile_given.data());
                    gather(inverse_rms, tokens, t, count, num_sources, tile_rms.data());
                    gather(lse, tokens, t, count, reads, tile_lse.data());
                    gather(grad_lse, tokens, t, count, reads, tile_grad_lse.data());
                }
                const float *own_scores = tile_scores.data() + token * pairs, *rms = tile_rms.data() + token * num_sources;
                for (int64_t s = 0; s < reads; s++) {
                    parts[s] = Rows{grad_mixed[s], mixed_dtype}.load(t, width, buffers[num_sources + s]);
                    means[s] = -tile_grad_lse[token * reads + s];
                }
                for (int64_t k = 0, i = 0; i < num_sources; i++) {
                    rows[i] = Rows{sources[i], source_dtype}.load(t, width, buffers[i]);
                    dots(rows[i], parts.data(), reads, width, grads.data() + i * reads);
                    for (int64_t s = 0; s < reads; s++, k++)
                        weights[k] = own_scores[k] - tile_lse[token * reads + s];
                }
                weights.exponentials();
                for (int64_t k = 0, i = 0; i < num_sources; i++)
                    for (int64_t s = 0; s < reads; s++, k++) means[s] += weights[k] * grads[k];
                for (int64_t k = 0, i = 0; i < num_sources; i++) {
                    along[i] = 0;
                    for (int64_t s = 0; s < reads; s++, k++) {
                        float grad = weights[k] * (grads[k] - means[s]);  // of the loss by the score
                        if (given) grad += tile_given[token * pairs + k];
                        along[i] -= own_scores[k] * grad * rms[i] / width;
                        grads[k] = grad * rms[i];
                        part_weights[s * num_sources + i] = weights[k];
                        part_weights[(reads + s) * num_sources + i] = grads[k];
                    }
                }
                if (product_sums)
                    combine(sums.data(), rows.data(), num_sources, grads.data(), reads, width, what_is_in(sums.data()));
                if (!grad_sources) continue;
                for (int64_t i = 0; i < num_sources; i++)
                    results[i] = Rows{grad_sources[i], source_dtype}.place(t, width, buffers[num_sources + reads + i]);
                const auto along_source = [&](int64_t i, int64_t d, auto zero) {
                    return load<decltype(zero)>(rows[i] + d) * rms[i] * along[i];  // rms * rms vanishes if it is huge
                };
                combine(results.data(), parts.data(), 2 * reads, part_weights.data(), num_sources, width, along_source);
                for (int64_t i = 0; i < num_sources; i++)
                    Rows{grad_sources[i], source_dtype}.store(t, width, results[i]);
            }
        }
    }
}

// `weights` may be null.
void step_forward(int64_t threads, int64_t tokens, int64_t width, Rows partial, Rows output, Rows mixed,
                  const float* lse, const float* product, const float* given_score, double key_eps, double scale,
                  Rows gain, double norm_eps, Dtype norm_dtype, Rows new_partial, Rows normed, Rows hidden,
                  float* weights, float* statistics) {
#pragma omp parallel num_threads(threads) if (is_much(tokens, width))
    {
        Buffers buffers(5, width);
        const float* gains = gain ? gain.load(0, width, buffers[0]) : nullptr;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            const float *closed = mixed.load(t, width, buffers[1]), *value = closed;
            float score = 0, rms = 0, closed_score = 0, closed_rms = 0, norm_rms = 0, weight = 0;
            if (output) {
                value = output.load(t, width, buffers[2]);
                if (partial) {
                    const float* before = partial.load(t, width, buffers[3]);
                    value = sum_of(before, value, new_partial, t, width, buffers[4]);
                }
                score = given_score ? given_score[t] : score_of(value, product, width, key_eps, &rms);
                closed_score = lse ? lse[t] : score_of(closed, product, width, key_eps, &closed_rms);
                weight = 1 / (1 + std::exp(closed_score - score));
                if (weights) weights[t] = weight;
            }
            const float factors[] = {float(scale * (1 - weight)), float(scale * weight)};
            const float* rows[] = {closed, value};
            float* read = hidden ? hidden.place(t, width, buffers[3]) : buffers[3];
            combine(read, rows, 2, factors, width, NOTHING);
            if (gain) norm_rms = normalise(read, gains, norm_eps, norm_dtype, normed, t, width, buffers[2]);
            if (hidden) hidden.store(t, width, read);
            const float numbers[] = {score, rms, closed_score, closed_rms, norm_rms};
            for (int64_t k = 0; k < 5; k++) statistics[k * tokens + t] = numbers[k];
        }
    }
}

// `product_sums` and `norm_sums` are (ranges, width), or null.
void step_backward(int64_t threads, int64_t tokens, int64_t width, Rows values, Rows mixed, const float* product,
                   Rows gain, const float* statistics, Rows grad_partial, Rows grad_normed, Rows grad_hidden,
                   const float* grad_weights, double scale, Dtype norm_dtype, Rows grad_value, Rows grad_mixed,
                   float* grad_lse, float* product_sums, float* norm_sums, int64_t ranges) {
#pragma omp parallel num_threads(threads) if (is_much(tokens, width))
    {
        Buffers buffers(8, width);
        const float* gains = gain ? gain.load(0, width, buffers[0]) : nullptr;
        float *unit = buffers[1], *grad = buffers[2];
#pragma omp for schedule(static)
        for (int64_t index = 0; index < ranges; index++) {
            Range range(index, ranges, tokens);
            float* product_sum = product_sums ? product_sums + index * width : nullptr;
            float* norm_sum = norm_sums ? norm_sums + index * width : nullptr;
            if (product_sum) std::memset(product_sum, 0, width * sizeof(float));
            if (norm_sum) std::memset(norm_sum, 0, width * sizeof(float));
            for (int64_t t = range.first; t < range.last; t++) {
                float score = statistics[t], rms = statistics[tokens + t], closed_score = statistics[2 * tokens + t];
                float closed_rms = statistics[3 * tokens + t], norm_rms = statistics[4 * tokens + t], weight = 0;
                const float *closed = mixed.load(t, width, buffers[3]), *value = closed;
                if (values) {
                    value = values.load(t, width, buffers[4]);
                    weight = 1 / (1 + std::exp(closed_score - score));
                }
                const float factors[] = {float(scale * (1 - weight)), float(scale * weight)};
                if (grad_normed) {
                    const float* given = grad_normed.load(t, width, buffers[5]);
                    const float* rows[] = {closed, value};
                    const float unit_factors[] = {norm_rms * factors[0], norm_rms * factors[1]};
                    combine(unit, rows, 2, unit_factors, width, NOTHING);
                    const float* normed = unit;
                    if (norm_dtype != FLOAT32) {
                        std::memcpy(buffers[6], unit, width * sizeof(float));
                        round_to(norm_dtype, buffers[6], width);
                        normed = buffers[6];
                    }
                    for_columns(width, [&](int64_t d, auto zero) {
                        using V = decltype(zero);
                        const V by_result = load<V>(given + d);
                        store<V>(norm_sum + d, load<V>(norm_sum + d) + by_result * load<V>(normed + d));
                        store<V>(grad + d, by_result * load<V>(gains + d));
                    });
                    float along;
                    dots<1>(grad, &unit, width, &along);
                    along /= width;
                    for_columns(width, [&](int64_t d, auto zero) {
                        using V = decltype(zero);
                        store<V>(grad + d, norm_rms * (load<V>(grad + d) - along * load<V>(unit + d)));
                    });
                } else {
                    std::memset(grad, 0, width * sizeof(float));
                }
                if (grad_hidden) {
                    const float *given = grad_hidden.load(t, width, buffers[5]), one = 1;
                    combine(grad, &given, 1, &one, width, what_is_in(&grad));
                }
                // of the loss by the score, of which one part is along the product and one along the source
                float by_product = 0, by_value = 0, closed_by_product = 0, by_closed = 0;
                if (values) {
                    const float* rows[] = {value, closed};
                    float products[2];
                    dots<2>(grad, rows, width, products);
                    float by_weight = scale * (products[0] - products[1]) + (grad_weights ? grad_weights[t] : 0);
                    float by_score = by_weight * weight * (1 - weight);
                    by_product = by_score * rms, by_value = -by_score * score / width * rms;
                    closed_by_product = -by_score * closed_rms;
                    by_closed = by_score * closed_score / width * closed_rms;
                    if (grad_lse) grad_lse[t] = -by_score;
                    if (product_sum) {
                        const float sum_factors[] = {by_product, closed_by_product};
                        combine(product_sum, rows, grad_lse ? 1 : 2, sum_factors, width, what_is_in(&product_sum));
                    }
                    // what is multiplied by zeros in the sums below is left out of them, as it may be missing
                    const float* parts[4] = {grad};
                    float part_factors[4] = {factors[1]};
                    int64_t count = 1;
                    if (product) {
                        parts[count] = product, part_factors[count++] = by_product;
                        parts[count] = times_rms(value, rms, width, buffers[6], &by_value);
                        part_factors[count++] = by_value;
                    }
                    if (grad_partial) parts[count] = grad_partial.load(t, width, buffers[5]), part_factors[count++] = 1;
                    float* result = grad_value.place(t, width, buffers[7]);
                    combine(result, parts, count, part_factors, width, NOTHING);
                    grad_value.store(t, width, result);
                }
                const bool is_scored = values && !grad_lse;
                if (is_scored) closed = times_rms(closed, closed_rms, width, buffers[6], &by_closed);
                const float* parts[] = {grad, product, closed};
                const float part_factors[] = {factors[0], closed_by_product, by_closed};
                float* result = grad_mixed.place(t, width, buffers[7]);
                combine(result, parts, is_scored ? 3 : 1, part_factors, width, NOTHING);
                grad_mixed.store(t, width, result);
            }
        }
    }
}

// A whole read. `output` joins the last source, and `new_partial` is the sum; or it is one more source; or it is null.
// `weights` is (batch, sources, seq), or null.
void read_forward(int64_t threads, int64_t tokens, int64_t seq, int64_t width, int64_t num_sources,
                  void* const* sources, const unsigned char* dtypes, Rows output, Rows new_partial,
                  const float* product, double eps, double scale, Rows gain, double norm_eps, Dtype norm_dtype,
                  Rows normed, Rows hidden, float* weights) {
    int64_t count = num_sources + (output && !new_partial);
#pragma omp parallel num_threads(threads) if (is_much(tokens, width * count))
    {
        Buffers buffers(count + 4, width);
        Numbers scores(count);
        std::vector<float> factors(count);
        std::vector<const float*> rows(count);
        const float* gains = gain ? gain.load(0, width, buffers[count]) : nullptr;
        float rms, highest, sum;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t i = 0; i < count; i++) {
                Rows source = i < num_sources ? Rows{sources[i], Dtype(dtypes[i])} : output;
                rows[i] = source.load(t, width, buffers[i]);
                if (new_partial && i + 1 == count) {
                    const float* added = output.load(t, width, buffers[count + 1]);
                    rows[i] = sum_of(rows[i], added, new_partial, t, width, buffers[count + 2]);
                }
                scores[i] = score_of(rows[i], product, width, eps, &rms);
            }
            exponentials(scores, count, 1, &highest, &sum);
            for (int64_t i = 0; i < count; i++)
                factors[i] = scores[i] * scale / sum;  // exactly 1 if as many scores as the scale says are equal
            for (int64_t i = 0; weights && i < count; i++)
                weights[(t / seq * count + i) * seq + t % seq] = scores[i] / sum;
            float* read = hidden ? hidden.place(t, width, buffers[count + 3]) : buffers[count + 3];
            combine(read, rows.data(), count, factors.data(), width, NOTHING);
            if (gain) normalise(read, gains, norm_eps, norm_dtype, normed, t, width, buffers[count + 1]);
            if (hidden) hidden.store(t, width, read);
        }
    }
}

// What the reads of one token share. Its tensors are of one dtype, but for products, float32, and gains.
struct Token {
    int64_t width;
    Dtype dtype;
    const float* products;  // (reads, width)
    double eps;
    void* const* sources;
};

// A read of one token, with the product `row`. Without a gain, the read itself is the result.
void token_read(const Token* token, int64_t row, int64_t num_sources, double scale, void* output, void* new_partial,
                void* gain, Dtype gain_dtype, double norm_eps, void* result) {
    const Dtype dtype = token->dtype, normed_dtype = dtype == FLOAT32 ? FLOAT32 : gain_dtype;
    const std::vector<unsigned char> dtypes(num_sources, dtype);
    const Rows normed{gain ? result : nullptr, normed_dtype}, read{gain ? nullptr : result, dtype};
    read_forward(1, 1, 1, token->width, num_sources, token->sources, dtypes.data(), Rows{output, dtype},
                 Rows{new_partial, dtype}, token->products + row * token->width, token->eps, scale,
                 Rows{gain, gain_dtype}, norm_eps, dtype, normed, read, nullptr);
}

}  // extern "C"
