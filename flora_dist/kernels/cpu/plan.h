// SPDX-License-Identifier: Apache-2.0
// A batch as the kernels see it: a flat table of int64, made once in Python (flora_dist/kernels/tables.py).
//
// Shape suffixes as in Python: H matrices that are here, N rows, M columns, K blocks a row, B block, R rank.
// Addresses stand in the table as integers. The Python side keeps their tensors alive and looks before every
// step whether they are where they were.
#pragma once
#include <cstdint>

namespace flora {

// Raised with every change of a struct in this file, of an operator's arguments or of their meaning.
constexpr int64_t kTableVersion = 5;

enum Rule : int64_t { kNone = 0, kBlend = 1, kFlora = 2, kStrict = 3, kMix = 4, kSubspace = 5, kApollo = 6 };
enum Normalise : int64_t { kFactored = 0, kRows = 1, kColumns = 2, kRaw = 3 };
enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kOctets = 5 };  // octets: records

struct Header {
  int64_t version;
  int64_t rule;
  int64_t is_dense;        // the momentum has one number per element
  int64_t weight_dtype;
  int64_t momentum_dtype;
  int64_t is_stochastic;   // rounding to a 16-bit dtype
  int64_t block;           // B
  int64_t rank;            // R
  int64_t is_hadamard;     // A is some rows of a Hadamard matrix, times signs and one number
  int64_t num_rows;        // N of the whole matrix
  int64_t num_columns;     // M of the whole matrix
  int64_t num_matrices;    // H
  int64_t num_summed;      // matrices in sums over ranks
  int64_t first_summed;    // place of the first of H among them
  int64_t num_row_slots;   // cut rows of all members
  int64_t sends_elements;  // of cut rows elements are sent, not the sums of their squares
  int64_t num_block_slots; // cut blocks of all members
  int64_t num_members;
  int64_t num_tiles;
  int64_t num_sources;     // tiles that a member's part consists of
  int64_t num_sums;        // 1: columns; 2: and squares; 3: and cross
  int64_t num_partials;    // numbers of all tiles' partial sums
  int64_t sums_weight;     // |W|^2 is asked for
  int64_t clips;
  int64_t momentum_bits;   // of a momentum in records
  int64_t momentum_table;  // address of their values
  int64_t normalise;
  int64_t limits_growth;   // of updates of matrices, in place of a clip
  int64_t side;            // of tiles of an update whose singular values are made alike; 0: it stays as it is
  int64_t moments;         // numbers that are kept of each one of a sketch
};

struct Matrix {
  int64_t first_tile;
  int64_t last_tile;
  int64_t member;
  int64_t column;          // address of the state C (M)
  int64_t norm;            // address of the last update's norm; 0 where its growth has no limit
  int64_t start;           // address of RMS(weight) at the first step; 0 where lr is not relative to it
};

struct Tile {
  int64_t member;
  int64_t source;          // which of the member's tiles this is cut from
  int64_t source_line;     // its first row, counted within that one
  int64_t matrix;          // among H
  int64_t line;            // its first row, e N + row, in the whole parameter
  int64_t num_rows;
  int64_t first;           // columns of the whole row, half open
  int64_t last;
  int64_t is_cut;          // other ranks hold the rest of these rows
  int64_t weight;          // address of the first element; rows follow each other
  int64_t gradient;        // offset of the first element in the member's gradient
  int64_t momentum;        // address of the first row's numbers
  int64_t momentum_stride; // numbers from row to row
  int64_t row;             // address of the state R of the first row
  int64_t new_row;         // offset of the new R of the first row
  int64_t partial;         // offset of the partial sums
  int64_t row_slot;        // place of the first cut row in a message
  int64_t head_slot;       // places of the cut blocks at both edges; -1 where the edge cuts none
  int64_t tail_slot;
};

struct Plan {
  const Header* header;
  const Matrix* matrices;
  const Tile* tiles;
};

static inline Plan plan_of(const int64_t* table) {
  const auto* header = reinterpret_cast<const Header*>(table);
  const auto* matrices = reinterpret_cast<const Matrix*>(table + sizeof(Header) / sizeof(int64_t));
  const auto* tiles = reinterpret_cast<const Tile*>(matrices + header->num_matrices);
  return {header, matrices, tiles};
}

// What changes from step to step.
struct Now {
  float beta2;
  float fresh2;            // 1 - beta2, taken in double: torch rounds it so
  float lr;
  float keep;              // 1 - lr * weight_decay
  float eps;
  float beta1;
  float gain;              // of the momentum in `blend`, `ademamix` and `subspace_adam`, times R / B
  float clip;
  float sign;              // -1 to maximize
  float growth;            // largest quotient of a matrix's update's norm and the last one's
  float sketch_eps;        // of second moments of sketched numbers
};
constexpr int64_t kNowNumbers = 11;

// Whether updates of matrices are bounded, so that their norms must be known.
static inline bool bounds(const Header& size) { return size.clips || size.limits_growth; }
// Whether that follows from U alone: it is summed before anything is written.
static inline bool sums_update(const Header& size) {
  return bounds(size) && (size.rule == kStrict || size.rule == kApollo);
}
// What a row is multiplied by, from its new R.
static inline float row_scale(const Header& size, float row) {
  return size.normalise == kColumns || size.normalise == kRaw ? 1.0f : 1 / __builtin_sqrtf(row);
}

// How the numbers of a block are written: a record of bytes, see flora_dist/core/sketch/quantise.py.
struct Code {
  int64_t bits;                // 32: fp32, 16: bfloat16, else 8, 4, 2 or 1
  int64_t numbers;             // R
  int64_t octets;              // of the numbers, without the scale
  int64_t bytes;               // of a record
  int64_t per_octet;
  int64_t room;                // R up to a power of two of at least eight: zeros stand after the numbers
  const float* table;          // (512, per octet): values of each byte over the scale, evenly spaced, then of levels
  const float* levels;         // (2^bits) ascending, or null where they are not asked for
  const float* edges;          // (2^bits - 1) between them
};

static inline Code code_of(int64_t bits, int64_t numbers, const float* table, const float* levels, const float* edges) {
  int64_t room = 8;
  while (room < numbers) room *= 2;
  const int64_t octets = (numbers * bits + 7) / 8, scale = bits < 16 ? 2 : 0;
  return {bits, numbers, octets, octets + scale, bits < 8 ? 8 / bits : 1, room, table, levels, edges};
}

enum GradientKind : int64_t { kMissing = -1, kSketched = 3, kRecords = 4 };  // else a Dtype

struct Gradients {
  int64_t kind;
  const int64_t* addresses;    // by member; of sketches by member and source
  const int64_t* sketches;     // by member: A (E, R, B) of sketched gradients
  int64_t block;
  int64_t rank;
  Code code;                   // of records
  const int64_t* factors;      // by member and source: address of what multiplies them; 0: nothing does
};

static inline bool is_sketched(const Gradients& given) { return given.kind == kSketched || given.kind == kRecords; }

enum Move : int64_t { kStays = 0, kMoves = 1, kResets = 2 };

// The momentum's basis before and after the step.
struct Basis {
  const float* old_HRB;
  const float* new_HRB;
  const float* columns_HBP;    // the new one transposed, R padded to P
  const float* move_HRP;       // s A_old A_new^T, padded likewise
  int64_t padded;              // P: R up to a multiple of 8
  int64_t move;
};

// What is known of the normalisation once message 1 is in; (H, .) each.
struct Settled {
  const float* factor;         // (H, M): what columns are multiplied by
  const float* rows;           // the new R of every tile's rows
  const float* clip;           // (H): what bounds the update
  const float* rate;           // (H)
  const float* blocks;         // whole sketches of cut blocks (slots, R), or null
};

struct MeasureSums {
  float* rows;                 // new R of whole rows
  float* cut_rows;             // squares of cut rows, by slot; or null
  float* elements;             // of whole cut rows (slots, M), or null
  float* products;             // G (M A) likewise, or null
  float* partial;              // by tile: num_sums x width
  double* scalars;             // by tile: |M A|^2, |W|^2
};

struct CoupleSums {
  double* scalars;             // by tile: |X|^2, <X, M A>
  float* blocks;               // partial sketches of cut blocks, by slot
  bool asks_blocks;
  bool asks_cross;
};

struct VectorSums {
  double* scalars;             // by tile, kVectorSums each: what is clipped squared, |W|^2, sum of V, of |G|
};
constexpr int64_t kVectorSums = 4;
constexpr int64_t kMatrixSums = 2;

struct FinishOptions {
  const int64_t* weight_keys;  // by member, of the rounding bits; null where nothing is rounded with bits
  const int64_t* momentum_keys;
  double* squares;             // by tile: |U|^2 alone is asked for, nothing is written; else null
};

// Gradients (E, N, W) that are added to sketches of their rows' blocks.
struct Sketching {
  const void* gradient;
  int64_t dtype;
  float* sums;                 // C (E, N, K, R)
  const float* sketch_ERB;
  int64_t num_rows;            // N
  int64_t width;               // W
  int64_t first_column;        // of the whole row
  int64_t blocks;              // K
  int64_t block;
  int64_t rank;
  int64_t is_hadamard;
};

// Random bits of some lines of the whole parameter, by their places in it.
struct Draws {
  uint64_t key;
  const int64_t* lines;        // by line here: its number in the whole parameter
  int64_t first;               // number of a line that its first one here is
  int64_t count;               // numbers of a whole line
};

// Records that gradients are added to: C <- Q(C + G A^T).
struct Adding {
  Sketching given;             // `sums` is null
  uint8_t* records;            // (E, N, K, bytes)
  Code code;
  bool is_fresh;               // nothing is there yet, and levels are asked for
  Draws draws;
};

// Records of several ranks, added in their order: out <- Q(sum / divisor).
struct Merging {
  const int64_t* sources;      // addresses (L, K, bytes), by rank
  int64_t num_sources;
  Code from;
  uint8_t* to;                 // (L, K, bytes)
  Code code;                   // 32 bits: nothing is rounded
  bool puts_at_levels;
  float divisor;
  int64_t blocks;              // K
  Draws draws;
};

// One instruction set's versions of everything that takes time.
struct Kernels {
  const char* name;
  void (*measure)(const Plan&, int64_t tile, const Gradients&, const Basis&, const Now&, const MeasureSums&,
                  float* scratch);
  void (*couple)(const Plan&, int64_t tile, const Gradients&, const Basis&, const Now&, const Settled&,
                 const CoupleSums&, float* scratch);
  void (*finish)(const Plan&, int64_t tile, const Gradients&, const Basis&, const Now&, const Settled&,
                 const FinishOptions&, float* scratch);
  void (*measure_vector)(const Plan&, int64_t tile, const Gradients&, const Now&, const VectorSums&,
                         float* scratch);
  void (*finish_vector)(const Plan&, int64_t tile, const Gradients&, const Now&, const Settled&,
                        const FinishOptions&, float* scratch);
  void (*accumulate)(const Sketching&, int64_t first, int64_t last, float* scratch);
  void (*add_records)(const Adding&, int64_t first, int64_t last, float* scratch);
  void (*merge_records)(const Merging&, int64_t first, int64_t last, float* scratch);
  void (*random_words)(uint64_t key, uint64_t first, int64_t count, uint32_t stream, uint32_t* words);
};

// Columns that are in work at one time, so that all their buffers stay in the first-level cache.
constexpr int64_t kChunk = 512;
constexpr int64_t kLineRows = 4;  // rows read side by side

static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t floats_for(const Sketching& s) {
  const int64_t padded = up(s.rank, 8);
  return up(s.blocks * s.block, 16) + s.blocks * padded + s.block * padded;
}
// Blocks in few bits that are in work together: of a chunk's numbers, or one.
constexpr int64_t kMostBlocks = kChunk / 8;
static inline int64_t blocks_together(int64_t room) { return room >= kChunk ? 1 : kChunk / room; }
// Floats for a Rotation.
static inline int64_t rotation_floats(int64_t block, int64_t rank) {
  return 2 * up(block, 16) + up(block > kChunk ? block : kChunk, 16) + up(rank, 16);
}
// Numbers of such blocks, and some that vectors may reach beyond them.
static inline int64_t record_span(const Code& code) { return (code.room > kChunk ? code.room : kChunk) + 32; }
// Floats for a RecordRoom.
static inline int64_t rounding_floats(const Code& code) {
  return 3 * record_span(code) + kChunk + 4 * kMostBlocks;
}
static inline int64_t floats_for(const Adding& a) {
  return up(a.given.blocks * a.given.block, 16) + rotation_floats(a.given.block, a.given.rank) +
         rounding_floats(a.code);
}
// A square whose singular values are made alike: numbers from row to row, and floats for the work on it.
static inline int64_t square_stride(int64_t columns) {
  const int64_t padded = up(columns, 16);
  return padded % 128 == 0 ? padded + 16 : padded;  // or a column's numbers would share few places of the cache
}
static inline int64_t square_floats(int64_t side) {
  return (up(side, 8) + 2 * up(side, 16) + 8) * square_stride(side) + 16;
}
static inline int64_t chunk_blocks(int64_t block) { return block >= kChunk ? 1 : kChunk / block; }

static inline Code momentum_code(const Header& size) {
  return code_of(size.momentum_bits, size.rank, reinterpret_cast<const float*>(size.momentum_table), nullptr, nullptr);
}
// Beside a tile's own, to read its gradient from records, and to round its momentum to some.
static inline int64_t gradient_floats(const Gradients& given) {
  return given.kind == kRecords ? up(rotation_floats(given.block, given.rank) + record_span(given.code), 16) : 0;
}
static inline int64_t record_floats(const Header& size, const Gradients& given) {
  return gradient_floats(given) +
         (size.momentum_dtype == kOctets ? up(rounding_floats(momentum_code(size)), 16) : 0);
}
// Likewise: the rows of U that squares are cut from, and one at work.
static inline int64_t strip_floats(const Header& size, int64_t width) { return up(size.side * width, 16); }
static inline int64_t squares_floats(const Header& size, int64_t width) {
  return size.side == 0 ? 0 : strip_floats(size, width) + up(square_floats(size.side), 16);
}
// Floats that one thread needs for a tile: rows in fp32, and the buffers of a chunk.
static inline int64_t scratch_floats(int64_t width, int64_t block, int64_t gradient_block, int64_t padded) {
  const int64_t blocks = chunk_blocks(block);
  return kLineRows * up(width + 2 * gradient_block, 16) + 2 * up(blocks * block, kChunk) + 7 * blocks * padded +
         2 * kChunk;
}

}  // namespace flora
