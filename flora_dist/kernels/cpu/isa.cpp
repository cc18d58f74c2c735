// SPDX-License-Identifier: Apache-2.0
// All kernels for one instruction set. Compiled several times, with FLORA_ISA naming the set; a CPU is given the
// newest that it has. The same file serves every architecture: the compiler makes vectors of what there is.
#include "finish.h"
#include "gradients.h"
#include "measure.h"
#include "quantised.h"
#include "vector.h"

#define FLORA_PASTE(a, b) a##b
#define FLORA_NAME(isa) FLORA_PASTE(kernels_, isa)
#define FLORA_QUOTE(isa) #isa
#define FLORA_TEXT(isa) FLORA_QUOTE(isa)

namespace flora {

const Kernels* FLORA_NAME(FLORA_ISA)() {
  static const Kernels kernels = {FLORA_TEXT(FLORA_ISA), measure,    couple,      finish,
                                  measure_vector,        finish_vector, accumulate, add_records,
                                  merge_records,         random_words};
  return &kernels;
}

}  // namespace flora
