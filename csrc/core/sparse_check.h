// Checks of the ops that make and read records of bitmaps.
#pragma once

#include "kvk/sparse.h"

namespace kvk {

void check_compress_pages(const CompressPagesArgs& args);
void check_decompress_pages(const DecompressPagesArgs& args);

}  // namespace kvk
