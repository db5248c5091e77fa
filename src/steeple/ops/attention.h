// The attention as a job for a team of threads: how its work is cut up and shared.
//
//     Job job(call); plan(job, threads); every thread: run(job);
//     next layer, same layout: restart(job, q, keys, values, out, blocks, scores); every thread: run(job); ...
#pragma once

#include <atomic>
#include <memory>
#include <new>

#include "attention_tile.h"

namespace attention {

constexpr int64_t STATES = 128;        // queries x heads of a piece: their sums stay in the cache of a core
constexpr int64_t PIECES = 4;          // pieces wanted per thread, to balance the load
constexpr double WORTH_A_THREAD = 4e3;  // nanoseconds of work below which another thread does not pay

enum Outcome { OK = 0, OUTSIDE_CACHE = 1, NO_MEMORY = 2, BAD_OFFSETS = 3 };

struct Piece {  // splits begin..end of some heads of a tile
    int64_t tile, first_head, heads, begin, end;
    int64_t slot;  // of the group of partial sums that the piece belongs to; -1 = it is the whole
};

struct Group {  // partial sums of one tile and its heads: one per split
    Sums sums;
    int64_t pieces;
    std::atomic<int64_t> missing;  // who brings the last adds them up
};

struct Job {
    explicit Job(const Call& call) : c(call) {}

    Call c;
    std::vector<Tile> tiles;
    std::vector<Piece> pieces;
    std::unique_ptr<Group[]> groups;
    int64_t num_groups = 0;
    std::unique_ptr<float[]> partial;
    Most most{0, 0, 0};
    std::vector<std::unique_ptr<Work>> works;  // one per thread, made by the first that needs it
    std::atomic<int64_t> next{0}, entered{0};
    std::atomic<int> outcome{OK};
};

inline bool rises(const int32_t* offsets, int64_t count, int64_t last) {  // offsets[0..count] from 0 to last
    for (int64_t i = 0; i < count; i++)
        if (offsets[i] > offsets[i + 1]) return false;
    return offsets[0] == 0 && offsets[count] == last;
}

// Whether the offsets fit `rows` rows and `entries` entries of all block tables.
inline bool valid(const Call& c, int64_t rows, int64_t entries) {
    const int64_t table = c.cu_blocks[c.requests];
    return rises(c.cu_rows, c.requests, rows) && rises(c.cu_blocks, c.requests, table) && c.head_stride >= 0 &&
           (c.kv_heads - 1) * c.head_stride + table <= entries;
}

inline double cost(const Call& c, const Tile& t) {  // rough nanoseconds of one head: memory, or arithmetic
    const double keys = (double)(t.last - t.first), queries = (double)(t.rows * c.group());
    const double reading = keys * c.words() * 8 / 22;
    const double arithmetic = keys * queries * (2.0 * c.words() / W / 3.4 * (c.kind() == BF16 ? 3 : 1) + 0.15);
    return 200 + std::max(reading, arithmetic);
}

inline void add_tiles(Job& job, int64_t request) {
    const Call& c = job.c;
    const int64_t first = c.cu_rows[request], rows = c.cu_rows[request + 1] - first;
    const int64_t most = c.most_rows(), count = (rows + most - 1) / most;
    // Page scores are those of the last tile: then it is full, and else they are alike.
    auto cut = [&](int64_t i) {
        return first + (c.scores ? std::max<int64_t>(0, rows - (count - i) * most) : rows * i / count);
    };
    for (int64_t i = 0; i < count; i++) {
        const int64_t begin = cut(i), end = cut(i + 1);
        job.tiles.push_back(tile_of(c, request, begin, end - begin));
        job.most.rows = std::max(job.most.rows, end - begin);
    }
    job.most.queries = job.most.rows * c.group();
}

// How a tile is cut: into so many parts along its splits and its heads.
struct Cut {
    int64_t splits, heads;
};

// Splits first: a thread that reads all heads of a block reads memory in order.
inline Cut cut_of(const Call& c, const Tile& t, double pieces) {
    const int64_t wanted = std::max<int64_t>(1, (int64_t)(pieces + 0.5)), queries = t.rows * c.group();
    Cut cut;
    cut.splits = std::max<int64_t>(1, std::min(t.splits(), wanted));
    if (c.scores && SPLIT % c.block_size) cut.splits = 1;  // a page across two splits is not for two threads to score
    const int64_t parts = (wanted + cut.splits - 1) / cut.splits;
    cut.heads = std::min(c.kv_heads, std::max(parts, (queries * c.kv_heads + STATES - 1) / STATES));
    return cut;
}

inline void add_pieces(Job& job, int64_t tile, Cut cut, int64_t& slot, float*& free) {
    const Call& c = job.c;
    const Tile& t = job.tiles[tile];
    const int64_t splits = t.splits(), begin = t.first / SPLIT;
    for (int64_t h = 0; h < cut.heads; h++) {
        const int64_t first = c.kv_heads * h / cut.heads, heads = c.kv_heads * (h + 1) / cut.heads - first;
        const int64_t states = t.rows * c.group() * heads, sums = splits * states;
        job.most.states = std::max(job.most.states, states);
        for (int64_t p = 0; p < cut.splits; p++)
            job.pieces.push_back({tile, first, heads, begin + splits * p / cut.splits,
                                  begin + splits * (p + 1) / cut.splits, cut.splits > 1 ? slot : -1});
        if (cut.splits == 1) continue;
        Group& group = job.groups[slot++];
        group.sums = {free, free + sums, free + 2 * sums};
        group.pieces = cut.splits;
        free += sums * (c.width() + 2);
    }
}

// The next layer, with the same layout. Resets what the last one used up; nobody may be in run().
inline void restart(Job& job, const char* q, const char* keys, const char* values, char* out, const int32_t* blocks,
                    float* scores) {
    job.c.q = q;
    job.c.keys = keys;
    job.c.values = values;
    job.c.out = out;
    job.c.blocks = blocks;
    job.c.scores = scores;
    job.next = job.entered = 0;
    for (int64_t i = 0; i < job.num_groups; i++) job.groups[i].missing = job.groups[i].pieces;
}

// Cuts the call into pieces of about equal cost, for at most `threads` threads; how many are worth waking, 0 if there
// is nothing to do. More may run it. Throws std::bad_alloc.
inline int64_t plan(Job& job, int64_t threads) {
    const Call& c = job.c;
    for (int64_t b = 0; b < c.requests; b++) add_tiles(job, b);
    job.works.resize(threads);
    if (job.tiles.empty()) return 0;
    double all = 0;
    for (const Tile& t : job.tiles) all += cost(c, t) * c.kv_heads;
    const int64_t worth = std::max<int64_t>(1, std::min<int64_t>(threads, (int64_t)(all / WORTH_A_THREAD)));
    std::vector<Cut> cuts;
    int64_t floats = 0;
    for (const Tile& t : job.tiles) {
        cuts.push_back(cut_of(c, t, worth > 1 ? cost(c, t) * c.kv_heads * worth * PIECES / all : 1));
        if (cuts.back().splits == 1) continue;
        job.num_groups += cuts.back().heads;
        floats += t.splits() * t.rows * c.heads * (c.width() + 2);
    }
    job.groups.reset(new Group[job.num_groups]);
    job.partial.reset(new float[floats]);
    float* free = job.partial.get();
    int64_t slot = 0;
    for (size_t i = 0; i < job.tiles.size(); i++) add_pieces(job, (int64_t)i, cuts[i], slot, free);
    restart(job, c.q, c.keys, c.values, c.out, c.blocks, c.scores);
    return worth;
}

inline Sums nth(const Sums& s, int64_t n, int64_t states, int64_t width) {
    return {s.most + n * states, s.mass + n * states, s.acc + n * states * width};
}

// What is read after the chunk at `start`, so that it can be fetched: in this piece, or in the one that follows.
inline void look_ahead(const Job& job, Work& w, const Piece& piece, const Piece* after, int64_t start) {
    const Call& c = job.c;
    w.next_head = piece.first_head;
    if (start < std::min(w.tile.last, piece.end * SPLIT)) {
        if (!locate(c, w.tile.request, w.next_head, start, w.tile.last, w.next)) w.next.count = 0;
        return;
    }
    w.next.count = 0;
    if (!after) return;
    const Tile& t = job.tiles[after->tile];
    w.next_head = after->first_head;
    if (!locate(c, t.request, w.next_head, t.begin(after->begin), t.last, w.next)) w.next.count = 0;
}

template <int KIND> bool run_chunk(const Job& job, Work& w, const Piece& piece, const Piece* after, int64_t start) {
    const Call& c = job.c;
    w.any = 0, w.all = ~0ull;
    for (int64_t r = 0; r < w.tile.rows; r++) {
        w.masks[r] = seen(w.rows[r], c.text_len[w.tile.request], start);
        w.any |= w.masks[r], w.all &= w.masks[r];
    }
    if (!w.any) return true;
    if (!locate(c, w.tile.request, w.first_head, start, w.tile.last, w.here)) return false;
    look_ahead(job, w, piece, after, start + CHUNK);
    const int64_t end = w.first_head + w.heads;
    for (int64_t head = w.first_head; head < end; head++) {
        const bool last = head + 1 == end, own = c.head_stride && !last;  // own: the next head has a table of its own
        if (own && !locate(c, w.tile.request, head + 1, start, w.tile.last, w.there)) return false;
        const Chunk& next = last ? w.next : own ? w.there : w.here;
        if (!attend<KIND>(w, start, head, view_in_cache(c, next, last ? w.next_head : head + 1))) return false;
        if (own) w.here = w.there;
    }
    return true;
}

// Sums of one split into w.part.
template <int KIND> bool run_split(const Job& job, Work& w, const Piece& piece, const Piece* after, int64_t split) {
    const int64_t states = w.heads * w.queries, stop = std::min(w.tile.last, (split + 1) * SPLIT);
    clear(w.part, states, job.c.width());
    std::fill_n(w.lanes.begin(), states * W, 0.0f);
    for (int64_t start = w.tile.begin(split); start < stop; start += CHUNK)
        if (!run_chunk<KIND>(job, w, piece, after, start)) return false;
    for (int64_t m = 0; m < states; m++) w.part.mass[m] = total(load<vf>(&w.lanes[m * W]));
    return true;
}

template <int KIND> bool run_piece(Job& job, const Piece& piece, const Piece* after, Work& w) {
    const Call& c = job.c;
    const int64_t width = c.width();
    open_tile(w, job.tiles[piece.tile], piece.first_head, piece.heads);
    const int64_t begin = w.tile.first / SPLIT, states = w.heads * w.queries;
    float* sums = w.sums.data();
    const Sums own{sums, sums + 2 * states, sums + 4 * states}, whole = nth(own, 1, states, width);
    if (piece.slot < 0) clear(whole, states, width);
    for (int64_t split = piece.begin; split < piece.end; split++) {
        w.part = piece.slot < 0 ? own : nth(job.groups[piece.slot].sums, split - begin, states, width);
        if (!run_split<KIND>(job, w, piece, after, split)) return false;
        if (piece.slot < 0) add(whole, w.part, states, width);
    }
    if (piece.slot >= 0) {
        Group& group = job.groups[piece.slot];
        if (group.missing.fetch_sub(1) > 1) return true;
        clear(whole, states, width);
        for (int64_t split = 0; split < w.tile.splits(); split++)
            add(whole, nth(group.sums, split, states, width), states, width);
    }
    write_out(c, w, whole);
    return true;
}

inline const Piece* take_piece(Job& job) {
    const int64_t i = job.next.fetch_add(1);
    return i < (int64_t)job.pieces.size() ? &job.pieces[i] : nullptr;
}

template <int KIND> void run_pieces(Job& job, Work& w) {
    for (const Piece *piece = take_piece(job), *after; piece; piece = after) {
        after = take_piece(job);
        if (!run_piece<KIND>(job, *piece, after, w)) job.outcome = OUTSIDE_CACHE;
    }
}

// What every thread of the team does. Ends when nothing is left to take; others may still be at their last piece.
inline void run(Job& job) {
    const int64_t thread = job.entered.fetch_add(1);
    if (thread >= (int64_t)job.works.size() || job.pieces.empty()) return;
    try {
        std::unique_ptr<Work>& work = job.works[thread];
        if (!work) work.reset(new Work(job.c, job.most));
        const int kind = job.c.kind();
        if (kind == F32) run_pieces<F32>(job, *work);
        else if (kind == BF16) run_pieces<BF16>(job, *work);
        else run_pieces<BF16_DOT>(job, *work);
    } catch (const std::bad_alloc&) {
        job.outcome = NO_MEMORY;
    }
}

}  // namespace attention
