// See masking.cpp.
#pragma once
#include <cstdint>

namespace megalm::helpers {

// What numpy's bit generators hand out (numpy/random/bitgen.h), whose layout is part of its public interface.
struct BitGenerator {
  void* state;
  uint64_t (*next_uint64)(void*);
  uint32_t (*next_uint32)(void*);
  double (*next_double)(void*);
  uint64_t (*next_raw)(void*);
};

struct Row {
  int64_t length;
  const int64_t* tokens;
  const uint8_t* special;
  const int64_t* documents;  // may be null
};

struct Masking {
  const uint8_t* starts;  // of the vocabulary; may be null
  int64_t vocabulary;     // entries of starts
  const int64_t* ordinary;
  int64_t ordinaries;
  int64_t mask, ignore;
  double chosen, masked, replaced;  // below: of a word, of a chosen token
};

// Throws std::out_of_range for an id that `starts` does not have.
void mask_tokens(const Row& row, const Masking& how, BitGenerator& draw, int64_t* corrupted, int64_t* labels);

}  // namespace megalm::helpers
