#include "core/explain.h"

namespace kvk::explain {

constinit thread_local Notes* current = nullptr;

}  // namespace kvk::explain
