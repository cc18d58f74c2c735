// SPDX-License-Identifier: Apache-2.0
// Between the messages: what follows for each matrix from the sums over all ranks.
#pragma once
#include "plan.h"

namespace flora {

// The sums of message 1; squares, cross, history and rows may be null. Places of matrices are those of a message.
struct Totals {
  const float* columns;  // (summed, M)
  const float* squares;
  const float* cross;
  const float* history;  // (summed)
  const float* cut_rows; // by slot
  const float* elements; // of whole cut rows, by slot, in place of their sums
};

struct Settling {
  float* rows;           // the new R; those of cut tiles are written here
  float* column;         // (H, M): the new C
  float* factor;         // (H, M)
  double* sums;          // (H, 3): |X|^2, <X, M A>, |M A|^2 of whole rows
};
constexpr int64_t kSettledSums = 3;

// What few ranks know of rows that their spans cut; all null elsewhere.
struct Whole {
  const float* elements;   // (slots, M), as a message has them: times the sign
  const float* products;   // G (M A) likewise, or null
  float* squares;          // sums of message 1 that the rows' norms are added to; null where they have been
  float* cross;
  const float* new_HRB;
  float* blocks;           // (slots, R): the sketches of cut blocks are written here; or null
};

// What message 2 adds, and what scales the rate; each may be null.
struct Clipping {
  const double* sums;    // (H, 3)
  const float* squares;  // (summed): of cut rows, or what is clipped itself
  const float* cross;
  const float* update;   // |U|^2 where it does not follow from sums
  const float* weight;   // |W|^2
};

// How a matrix's update is bounded: by 1 / max(1, RMS / clip), or by the norm that the last one had.
struct Bound {
  float factor;          // what it is multiplied by
  float norm;            // what is left of it, where its growth has a limit
};

void settle_rows(const Plan&, int64_t tile, const Now&, const Totals&, const Settling&);
void add_norms(const Plan&, int64_t tile, const float* rows, const Whole&);
void sketch_cut_blocks(const Plan&, int64_t tile, const float* rows, const float* factor, const Whole&);
void settle_matrix(const Plan&, int64_t matrix, const Now&, const Totals&, const Settling&);
Bound bound_of(const Plan&, int64_t matrix, const Now&, const Clipping&);
void write_norm(const Plan&, int64_t matrix, const Bound&);
// What updates are stepped by. Writes the state that it is relative to, at the first step.
float take_rate(const Plan&, int64_t matrix, const Now&, const Clipping&);

}  // namespace flora
