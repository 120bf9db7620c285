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

struct Sum {
    Vector lanes{}, second{};
    float rest = 0;

    void operator+=(const Vector& values) { lanes += values; }
    void operator+=(float value) { rest += value; }
    float total() const {
        float parts[LANES];
        store(parts, lanes + second);
#pragma GCC unroll 4
        for (int64_t half = LANES / 2; half > 0; half /= 2)
            for (int64_t k = 0; k < half; k++) parts[k] += parts[k + half];
        return parts[0] + rest;
    }
};

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

// The dot products of a row with COUNT others: sums of sums, as in long sums rounding errors grow.
template <int COUNT>
inline void dots(const float* row, const float* const* others, int64_t width, float* results) {
    constexpr int64_t PART = 32 * LANES;
    for (int k = 0; k < COUNT; k++) results[k] = 0;
    for (int64_t start = 0; start < width; start += PART) {
        const int64_t end = std::min(width, start + PART);
        Sum sums[COUNT];
        int64_t d = start;
        for (; d + 2 * LANES <= end; d += 2 * LANES) {
            const Vector first = load<Vector>(row + d), second = load<Vector>(row + d + LANES);
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) {
                sums[k].lanes += first * load<Vector>(others[k] + d);
                sums[k].second += second * load<Vector>(others[k] + d + LANES);
            }
        }
        for_columns(
            end,
            [&](int64_t d, auto zero) {
                using V = decltype(zero);
                const V value = load<V>(row + d);
#pragma GCC unroll 4
                for (int k = 0; k < COUNT; k++) sums[k] += value * load<V>(others[k] + d);
            },
            d);
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) results[k] += sums[k].total();
    }
}

void dots(const float* row, const float* const* others, int64_t count, int64_t width, float* results) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) dots<4>(row, others + k, width, results + k);
    for (; k < count; k++) dots<1>(row, others + k, width, results + k);
}

// COUNT sums of rows, the weight of row i in sum k being weights[i * count + k], added to what is there if asked to.
template <int COUNT>
inline void combine(float* const* sums, const float* const* rows, int64_t num_rows, const float* weights, int64_t count,
                    int64_t width, bool add) {
    int64_t d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES) {
        Vector firsts[COUNT], seconds[COUNT];
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) {
            firsts[k] = add ? load<Vector>(sums[k] + d) : Vector{};
            seconds[k] = add ? load<Vector>(sums[k] + d + LANES) : Vector{};
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
            for (int k = 0; k < COUNT; k++) totals[k] = add ? load<V>(sums[k] + d) : V{};
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

void combine(float* const* sums, const float* const* rows, int64_t num_rows, const float* weights, int64_t count,
             int64_t width, bool add) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) combine<4>(sums + k, rows, num_rows, weights + k, count, width, add);
    for (; k < count; k++) combine<1>(sums + k, rows, num_rows, weights + k, count, width, add);
}

// Turns scores into softmax weights, and returns the log of the sum of their exponentials. `factors` may be null; they are
// the weights times a scale, and exactly 1 where as many scores as the scale says are equal.
float softmax(float* scores, int64_t count, int64_t stride, float scale = 1, float* factors = nullptr) {
    float highest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < count; i++) highest = std::fmax(highest, scores[i * stride]);
    for (int64_t i = 0; i < count; i++) sum += scores[i * stride] = std::exp(scores[i * stride] - highest);
    for (int64_t i = 0; factors && i < count; i++) factors[i] = scores[i * stride] * scale / sum;
    for (int64_t i = 0; i < count; i++) scores[i * stride] /= sum;
    return highest + std::log(sum);
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

// With fewer numbers, starting threads takes longer than the work.
bool is_much(int64_t tokens, int64_t numbers_per_token) { return tokens > 1 && tokens * numbers_per_token > 1 << 15; }

}  // namespace

extern "C" {

void closed_forward(int64_t threads, int64_t tokens, int64_t width, int64_t num_sources, int64_t reads,
                    void* const* sources, Dtype source_dtype, const float* products, double eps, void* const* mixed,
                    Dtype mixed_dtype, float* lse, float* scores, float* inverse_rms) {
#pragma omp parallel num_threads(threads) if (is_much(tokens, width * num_sources))
    {
        Buffers buffers(num_sources + reads, width);
        std::vector<float> weights(num_sources * reads), products_with_row(reads + 1);
        std::vector<const float*> rows(num_sources), others(reads + 1);
        std::vector<float*> results(reads);
        for (int64_t s = 0; s < reads; s++) others[s] = products + s * width;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t i = 0; i < num_sources; i++) {
                others[reads] = rows[i] = Rows{sources[i], source_dtype}.load(t, width, buffers[i]);
                dots(rows[i], others.data(), reads + 1, width, products_with_row.data());
                float rms = inverse_rms_of(products_with_row[reads], width, eps);
                inverse_rms[i * tokens + t] = rms;
                for (int64_t s = 0; s < reads; s++) {
                    weights[i * reads + s] = products_with_row[s] * rms;
                    scores[(i * reads + s) * tokens + t] = weights[i * reads + s];
                }
            }
            for (int64_t s = 0; s < reads; s++) {
                lse[s * tokens + t] = softmax(weights.data() + s, num_sources, reads);
                results[s] = Rows{mixed[s], mixed_dtype}.place(t, width, buffers[num_sources + s]);
            }
            combine(results.data(), rows.data(), num_sources, weights.data(), reads, width, false);
            for (int64_t s = 0; s < reads; s++) Rows{mixed[s], mixed_dtype}.store(t, width, results[s]);
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
        Buffers buffers(2 * num_sources + reads, width);
        std::vector<float> weights(num_sources * reads), grads(num_sources * reads), along(num_sources);
        // what the gradients of the sources are sums of: gradients of the reads and products, and their weights
        std::vector<float> part_weights(2 * reads * num_sources);
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
                for (int64_t s = 0; s < reads; s++)
                    parts[s] = Rows{grad_mixed[s], mixed_dtype}.load(t, width, buffers[num_sources + s]);
                for (int64_t i = 0; i < num_sources; i++) {
                    rows[i] = Rows{sources[i], source_dtype}.load(t, width, buffers[i]);
                    dots(rows[i], parts.data(), reads, width, grads.data() + i * reads);
                }
                for (int64_t s = 0; s < reads; s++) {  // of the loss by the scores
                    float mean = -grad_lse[s * tokens + t];
                    for (int64_t k = s; k < num_sources * reads; k += reads) {
                        weights[k] = std::exp(scores[k * tokens + t] - lse[s * tokens + t]);
                        mean += weights[k] * grads[k];
                    }
                    for (int64_t k = s; k < num_sources * reads; k += reads)
                        grads[k] = weights[k] * (grads[k] - mean) + (given ? given[k * tokens + t] : 0);
                }
                for (int64_t i = 0; i < num_sources; i++) {
                    float rms = inverse_rms[i * tokens + t];
                    along[i] = 0;
                    for (int64_t s = 0; s < reads; s++) {
                        int64_t k = i * reads + s;
                        along[i] -= scores[k * tokens + t] * grads[k] * rms / width;
                        grads[k] *= rms;
                        part_weights[s * num_sources + i] = weights[k];
                        part_weights[(reads + s) * num_sources + i] = grads[k];
                    }
                }
                if (product_sums)
                    combine(sums.data(), rows.data(), num_sources, grads.data(), reads, width, true);
                if (!grad_sources) continue;
                for (int64_t i = 0; i < num_sources; i++) {
                    results[i] = Rows{grad_sources[i], source_dtype}.place(t, width, buffers[num_sources + reads + i]);
                    const float rms = inverse_rms[i * tokens + t];  // its square vanishes where the source is huge
                    for_columns(width, [&](int64_t d, auto zero) {
                        store(results[i] + d, load<decltype(zero)>(rows[i] + d) * rms * along[i]);
                    });
                }
                combine(results.data(), parts.data(), 2 * reads, part_weights.data(), num_sources, width, true);
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
            combine<1>(&read, rows, 2, factors, 1, width, false);
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
                    combine<1>(&unit, rows, 2, unit_factors, 1, width, false);
                    const float* normed = unit;
                    if (norm_dtype != FLOAT32) {
                        std::memcpy(buffers[6], unit, width * sizeof(float));
                        round_to(norm_dtype, buffers[6], width);
                        normed = buffers[6];
                    }
                    Sum products;
                    for_columns(width, [&](int64_t d, auto zero) {
                        using V = decltype(zero);
                        const V by_result = load<V>(given + d), by_unit = by_result * load<V>(gains + d);
                        store<V>(norm_sum + d, load<V>(norm_sum + d) + by_result * load<V>(normed + d));
                        store<V>(grad + d, by_unit);
                        products += by_unit * load<V>(unit + d);
                    });
                    const float along = products.total() / width;
                    for_columns(width, [&](int64_t d, auto zero) {
                        using V = decltype(zero);
                        store<V>(grad + d, norm_rms * (load<V>(grad + d) - along * load<V>(unit + d)));
                    });
                } else {
                    std::memset(grad, 0, width * sizeof(float));
                }
                if (grad_hidden) {
                    const float *given = grad_hidden.load(t, width, buffers[5]), one = 1;
                    combine<1>(&grad, &given, 1, &one, 1, width, true);
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
                        combine<1>(&product_sum, rows, grad_lse ? 1 : 2, sum_factors, 1, width, true);
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
                    combine<1>(&result, parts, count, part_factors, 1, width, false);
                    grad_value.store(t, width, result);
                }
                const bool is_scored = values && !grad_lse;
                if (is_scored) closed = times_rms(closed, closed_rms, width, buffers[6], &by_closed);
                const float* parts[] = {grad, product, closed};
                const float part_factors[] = {factors[0], closed_by_product, by_closed};
                float* result = grad_mixed.place(t, width, buffers[7]);
                combine<1>(&result, parts, is_scored ? 3 : 1, part_factors, 1, width, false);
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
        std::vector<float> scores(count), factors(count);
        std::vector<const float*> rows(count);
        const float* gains = gain ? gain.load(0, width, buffers[count]) : nullptr;
        float rms;
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
            softmax(scores.data(), count, 1, scale, factors.data());
            for (int64_t i = 0; weights && i < count; i++)
                weights[(t / seq * count + i) * seq + t % seq] = scores[i];
            float* read = hidden ? hidden.place(t, width, buffers[count + 3]) : buffers[count + 3];
            combine<1>(&read, rows.data(), count, factors.data(), 1, width, false);
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
