// Everything of the C++ face.
#pragma once

#include "kvk/api.h"
#include "kvk/context.h"
#include "kvk/hadamard.h"
#include "kvk/lightning.h"
#include "kvk/linear.h"
#include "kvk/paged.h"
#include "kvk/quant.h"
#include "kvk/sparse.h"
#include "kvk/threads.h"
#include "kvk/types.h"
