// Corruption of a row for masked language modelling, as megalm/data/masking.py defines it. Draws come in the order of its
// passes: one for each word, one for each chosen token, one for each that is replaced.
#include "helpers/masking.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace megalm::helpers {

void mask_tokens(const Row& row, const Masking& how, BitGenerator& draw, int64_t* corrupted, int64_t* labels) {
  std::vector<int64_t> chosen;
  chosen.reserve(row.length);
  bool taken = false;
  for (int64_t i = 0; i < row.length; ++i) {
    const int64_t token = row.tokens[i];
    corrupted[i] = token, labels[i] = how.ignore;
    if (how.starts != nullptr && (token < 0 || token >= how.vocabulary))
      throw std::out_of_range("token " + std::to_string(token) + " of a vocabulary of " + std::to_string(how.vocabulary));
    if (row.special[i] != 0) continue;
    const bool begins = how.starts == nullptr || how.starts[token] != 0 || i == 0 || row.special[i - 1] != 0 ||
                        (row.documents != nullptr && row.documents[i] != row.documents[i - 1]);
    if (begins) taken = draw.next_double(draw.state) < how.chosen;
    if (taken) {
      labels[i] = token;
      chosen.push_back(i);
    }
  }
  size_t replaced = 0;
  for (const int64_t i : chosen) {
    const double kind = draw.next_double(draw.state);
    if (kind < how.masked) corrupted[i] = how.mask;
    else if (kind < how.replaced) chosen[replaced++] = i;
  }
  for (size_t k = 0; k < replaced; ++k) {
    const double place = draw.next_double(draw.state) * static_cast<double>(how.ordinaries);
    corrupted[chosen[k]] = how.ordinary[static_cast<int64_t>(place)];
  }
}

}  // namespace megalm::helpers
