#include "format/dtype.h"

#include <stdexcept>
#include <string>

namespace peftk {

void refuse(const char* expected, long value) {
  throw std::invalid_argument(std::string(expected) + ", got " + std::to_string(value));
}

}  // namespace peftk
