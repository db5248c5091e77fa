// A round of drafting chains: k forwards of one row per request, and between them the head and the choice of a token.
#pragma once

#include "forward.h"

namespace forward {

struct Round {
    int64_t depth;                           // k
    const int64_t *positions, *slots;        // [k, B]
    const int32_t *seen, *row_positions;     // [k, B]: keys in the view; rotary positions
    int64_t* tokens;                         // [k + 1, B]: the roots, then what is chosen
    const float* temperature;                // [B]
    const double* uniform;                   // [k, B]
    float* laws;                             // [k, B, vocab]: what tokens are drawn from; null: the likeliest are taken
    float* logits;                           // [B, vocab], where they are drawn
    Matrix carry;                            // projection of the state before a row into its input; data null: none
    const char* state;                       // [B, D]: before the roots
    char *added, *hidden;                    // [B, D] each: room
};

// The step of a pass: the first one's, with what changes from pass to pass.
inline Step pass_of(const Round& r, const Step& first, int64_t pass) {
    Step s = first;
    const int64_t at = pass * s.rows;
    s.tokens = r.tokens + at, s.positions = r.positions + at, s.slots = r.slots + at;
    s.prefix = s.text_len = r.seen + at, s.row_positions = r.row_positions + at;
    s.added = r.carry.data ? r.added : nullptr, s.hidden = r.hidden;
    s.keep = nullptr, s.scores = nullptr;
    return s;
}

}  // namespace forward
