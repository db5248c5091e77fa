// The C interface of the native attention. The arguments are explained in attention.py and native_attention.py.
#include "attention.h"
#include "team.h"

namespace {

bool has_slots(const int64_t* slots, int64_t count, int64_t all) {
    return std::all_of(slots, slots + count, [all](int64_t slot) { return slot >= 0 && slot < all; });
}

}  // namespace

extern "C" {

int steeple_attention(const void* q, const void* keys, const void* values, void* out, float* scores,
                      const int32_t* cu_rows,
                      const int32_t* blocks, const int32_t* cu_blocks, const int32_t* prefix, const int64_t* ancestors,
                      const int32_t* text_len, const int32_t* positions, int64_t requests, int64_t entries,
                      int64_t head_stride, int64_t rows, int64_t q_stride, int64_t num_blocks, int64_t block_size, int64_t heads,
                      int64_t kv_heads, int64_t head_dim, int64_t window, float scale, float softcap, int q_bf16,
                      int kv_bf16, int64_t threads, team::Run run, team::Size size) {
    const attention::Call c{(const char*)q, (const char*)keys, (const char*)values, (char*)out, scores, cu_rows, blocks,
                            cu_blocks, prefix, text_len, positions, ancestors, q_stride, requests, num_blocks,
                            block_size, heads, kv_heads, head_dim, window, head_stride, scale, softcap, q_bf16 != 0,
                            kv_bf16 != 0};
    if (!attention::valid(c, rows, entries)) return attention::BAD_OFFSETS;
    try {
        attention::Job job(c);
        threads = attention::plan(job, threads);
        team::parallel([&](int, int) { attention::run(job); }, threads, run, size);
        return job.outcome;
    } catch (const std::bad_alloc&) {
        return attention::NO_MEMORY;
    }
}

// keys[slot] = k, values[slot] = v for every row; rows of k and v are k_stride and v_stride bytes apart.
int steeple_write(char* keys, char* values, const int64_t* slots, char* k, char* v, int64_t k_stride, int64_t v_stride,
                  int64_t rows, int64_t num_blocks, int64_t kv_heads, int64_t block_size, int64_t head_dim, int bf16) {
    const attention::Store store{keys, values, kv_heads, block_size, head_dim, bf16 != 0};
    const int64_t size = head_dim * store.bytes();
    if (!has_slots(slots, rows, num_blocks * block_size)) return attention::OUTSIDE_CACHE;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t head = 0; head < kv_heads; head++)
            attention::put(store, slots[t], head, k + t * k_stride + head * size, v + t * v_stride + head * size);
    return attention::OK;
}

// keys[target] = keys[source] and the same for values; all are read before any is written.
int steeple_move(char* keys, char* values, const int64_t* source, const int64_t* target, int64_t count,
                 int64_t num_blocks, int64_t kv_heads, int64_t block_size, int64_t head_dim, int bf16) {
    const attention::Store store{keys, values, kv_heads, block_size, head_dim, bf16 != 0};
    const int64_t size = head_dim * store.bytes(), all = num_blocks * block_size;
    if (!has_slots(source, count, all) || !has_slots(target, count, all)) return attention::OUTSIDE_CACHE;
    try {
        std::vector<char> room(2 * count * kv_heads * size);
        char* at = room.data();
        for (int64_t i = 0; i < count; i++)
            for (int64_t head = 0; head < kv_heads; head++, at += 2 * size)
                attention::take(store, source[i], head, at, at + size);
        at = room.data();
        for (int64_t i = 0; i < count; i++)
            for (int64_t head = 0; head < kv_heads; head++, at += 2 * size)
                attention::put(store, target[i], head, at, at + size);
    } catch (const std::bad_alloc&) {
        return attention::NO_MEMORY;
    }
    return attention::OK;
}
}
