// The C interface of the native attention, and how its work is cut up and shared among threads.
// The arguments are explained in attention.py and native.py.
#include <atomic>
#include <memory>
#include <thread>

#include "attention_kernel.h"

namespace {

constexpr int64_t TILE = 64;           // queries (rows x heads that share a key) of a tile
constexpr int64_t PIECES = 4;          // pieces wanted per thread, to balance the load
constexpr double WORTH_A_THREAD = 4e3;  // nanoseconds of work below which another thread does not pay

enum Outcome { OK = 0, OUTSIDE_CACHE = 1, NO_MEMORY = 2, BAD_OFFSETS = 3 };

// Same as GOMP_parallel: runs body(data) on `threads` threads, the caller's included.
typedef void (*Team)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

void own_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; i++) team.emplace_back(body, data);
    body(data);
    for (auto& thread : team) thread.join();
}

struct Piece {  // splits begin..end of one head of a tile
    int64_t tile, head, begin, end;
    int64_t slot;  // of the group of partial sums that the piece belongs to; -1 = it is the whole
};

struct Group {  // partial sums of one tile and head: one per split
    Sums sums;
    std::atomic<int64_t> missing;  // pieces; who brings the last adds them up
};

struct Job {
    explicit Job(const Call& call) : c(call) {}

    const Call& c;
    std::vector<Tile> tiles;
    std::vector<Piece> pieces;
    std::unique_ptr<Group[]> groups;
    std::unique_ptr<float[]> partial;
    int64_t most_queries = 0, most_rows = 0;
    std::atomic<int64_t> next{0};
    std::atomic<int> outcome{OK};
};

void add_tiles(Job& job, int64_t request) {
    const Call& c = job.c;
    const int64_t first = c.cu_rows[request], rows = c.cu_rows[request + 1] - first;
    const int64_t most = std::max<int64_t>(1, TILE / c.group()), count = (rows + most - 1) / most;
    for (int64_t i = 0; i < count; i++) {
        Tile t{request, first + rows * i / count, 0, INT64_MAX, 0};
        t.rows = first + rows * (i + 1) / count - t.row;
        for (int64_t r = t.row; r < t.row + t.rows; r++) {
            const Row row = row_of(c, r);
            const int64_t nodes = row.nodes ? 64 - __builtin_clzll(row.nodes) : 0;
            t.last = std::max({t.last, row.last, nodes ? c.text_len[request] + nodes : 0});
            if (row.last > row.first) t.first = std::min(t.first, row.first);
            if (nodes) t.first = std::min<int64_t>(t.first, c.text_len[request]);
        }
        t.first = std::min(t.first, t.last);
        job.most_rows = std::max(job.most_rows, t.rows);
        job.tiles.push_back(t);
    }
    job.most_queries = job.most_rows * c.group();
}

double cost(const Call& c, const Tile& t) {  // rough nanoseconds per head: reading, and arithmetic per query
    const double bytes = (double)(t.last - t.first) * c.words() * 8;
    return 200 + bytes / 25 * (1 + (double)(t.rows * c.group()) / 12);
}

// Cut every tile and head into pieces of about equal cost. Returns the number of threads worth waking.
int64_t add_pieces(Job& job, int64_t threads) {
    const Call& c = job.c;
    double all = 0;
    for (const Tile& t : job.tiles) all += cost(c, t) * c.kv_heads;
    threads = std::max<int64_t>(1, std::min<int64_t>(threads, (int64_t)(all / WORTH_A_THREAD)));
    std::vector<int64_t> cuts;
    int64_t groups = 0, floats = 0;
    for (const Tile& t : job.tiles) {
        const double share = threads > 1 ? cost(c, t) * threads * PIECES / all : 1;
        cuts.push_back(std::max<int64_t>(1, std::min<int64_t>(t.splits(), (int64_t)(share + 0.5))));
        if (cuts.back() == 1) continue;
        groups += c.kv_heads;
        floats += c.kv_heads * t.splits() * t.rows * c.group() * (c.width() + 2);
    }
    job.groups.reset(new Group[groups]);
    job.partial.reset(new float[floats]);
    float* free = job.partial.get();
    int64_t slot = 0;
    for (size_t i = 0; i < job.tiles.size(); i++)
        for (int64_t head = 0; head < c.kv_heads; head++) {
            const int64_t n = cuts[i], splits = job.tiles[i].splits(), begin = job.tiles[i].first / SPLIT;
            const int64_t sums = splits * job.tiles[i].rows * c.group();
            for (int64_t p = 0; p < n; p++)
                job.pieces.push_back(
                    {(int64_t)i, head, begin + splits * p / n, begin + splits * (p + 1) / n, n > 1 ? slot : -1});
            if (n == 1) continue;
            job.groups[slot].sums = {free, free + sums, free + 2 * sums};
            job.groups[slot++].missing = n;
            free += sums * (c.width() + 2);
        }
    return threads;
}

Sums nth(const Sums& s, int64_t n, int64_t queries, int64_t width) {
    return {s.most + n * queries, s.mass + n * queries, s.acc + n * queries * width};
}

bool run_piece(Job& job, const Piece& piece, Work& w, const Sums& own) {
    const Call& c = job.c;
    const int64_t width = c.width();
    open_tile(w, job.tiles[piece.tile], piece.head);
    const int64_t start = w.tile.first / SPLIT, q = w.queries;
    const Sums whole = nth(own, 1, job.most_queries, width);
    if (piece.slot < 0) clear(whole, q, width);
    for (int64_t split = piece.begin; split < piece.end; split++) {
        w.part = piece.slot < 0 ? own : nth(job.groups[piece.slot].sums, split - start, q, width);
        if (!run_split(w, split)) return false;
        if (piece.slot < 0) add(whole, w.part, q, width);
    }
    if (piece.slot >= 0) {
        Group& group = job.groups[piece.slot];
        if (group.missing.fetch_sub(1) > 1) return true;
        clear(whole, q, width);
        for (int64_t split = 0; split < w.tile.splits(); split++)
            add(whole, nth(group.sums, split, q, width), q, width);
    }
    write_out(c, w.tile, piece.head, whole);
    return true;
}

void run_pieces(void* data) {
    Job& job = *(Job*)data;
    try {
        Work w(job.c, job.most_rows);
        const int64_t q = job.most_queries;
        std::unique_ptr<float[]> own(new float[2 * q * (job.c.width() + 2)]);
        const Sums sums{own.get(), own.get() + 2 * q, own.get() + 4 * q};
        for (int64_t i; (i = job.next.fetch_add(1)) < (int64_t)job.pieces.size();)
            if (!run_piece(job, job.pieces[i], w, sums)) job.outcome = OUTSIDE_CACHE;
    } catch (const std::bad_alloc&) {
        job.outcome = NO_MEMORY;
    }
}

bool rises(const int32_t* offsets, int64_t count, int64_t last) {  // offsets[0..count] from 0 to last
    for (int64_t i = 0; i < count; i++)
        if (offsets[i] > offsets[i + 1]) return false;
    return offsets[0] == 0 && offsets[count] == last;
}

}  // namespace

#include "linear.h"

extern "C" {

int steeple_attention(const void* q, const void* keys, const void* values, void* out, const int32_t* cu_rows,
                      const int32_t* blocks, const int32_t* cu_blocks, const int32_t* prefix, const int64_t* ancestors,
                      const int32_t* text_len, const int32_t* positions, int64_t requests, int64_t entries,
                      int64_t rows, int64_t q_stride, int64_t num_blocks, int64_t block_size, int64_t heads,
                      int64_t kv_heads, int64_t head_dim, int64_t window, float scale, float softcap, int q_bf16,
                      int kv_bf16, int64_t threads, Team team) {
    Call c{(const char*)q, (const char*)keys, (const char*)values, (char*)out, cu_rows, blocks, cu_blocks, prefix,
           text_len, positions, ancestors, q_stride, requests, num_blocks, block_size, heads, kv_heads, head_dim,
           window, scale, softcap, q_bf16 != 0, kv_bf16 != 0, F32};
    if (!rises(cu_rows, requests, rows) || !rises(cu_blocks, requests, entries)) return BAD_OFFSETS;
    if (c.kv_bf16) c.kind = HAS_DOT && c.q_bf16 ? BF16_DOT : BF16;
    try {
        Job job(c);
        for (int64_t b = 0; b < requests; b++) add_tiles(job, b);
        if (job.tiles.empty()) return OK;
        threads = add_pieces(job, threads);
        if (threads <= 1) run_pieces(&job);
        else (team ? team : own_threads)(run_pieces, &job, (unsigned)threads, 0);
        return job.outcome;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

// keys[slot] = k, values[slot] = v for every row; rows of k and v are k_stride and v_stride bytes apart.
int steeple_write(char* keys, char* values, const int64_t* slots, const char* k, const char* v, int64_t k_stride,
                  int64_t v_stride, int64_t rows, int64_t num_blocks, int64_t kv_heads, int64_t block_size,
                  int64_t head_bytes) {
    for (int64_t t = 0; t < rows; t++) {
        if (slots[t] < 0 || slots[t] >= num_blocks * block_size) return OUTSIDE_CACHE;
        for (int64_t head = 0; head < kv_heads; head++) {
            const int64_t row = (slots[t] / block_size * kv_heads + head) * block_size + slots[t] % block_size;
            std::memcpy(keys + row * head_bytes, k + t * k_stride + head * head_bytes, head_bytes);
            std::memcpy(values + row * head_bytes, v + t * v_stride + head * head_bytes, head_bytes);
        }
    }
    return OK;
}
}
