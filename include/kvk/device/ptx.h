// Every PTX instruction that kvk uses, behind a thin wrapper: one signature, two bodies (the instruction, and a call of
// the emulator). No other header and no kernel contains asm.
#pragma once

#include "kvk/device/ptx_async.h"
#include "kvk/device/ptx_barrier.h"
#include "kvk/device/ptx_hopper.h"
#include "kvk/device/ptx_math.h"
#include "kvk/device/ptx_memory.h"
#include "kvk/device/ptx_mma.h"
#include "kvk/device/ptx_wgmma.h"
