// Compiled kernels on disk: one file per cubin, named by the hash of all that went into it.
#pragma once

#include <optional>
#include <string>

namespace kvk::cuda {

struct Cubin {
  std::string image;         // the ELF file that the driver loads
  std::string lowered_name;  // the kernel's symbol in it
  std::string log;           // the compiler's, with ptxas's registers and spills
};

// $KVK_CACHE, else ${XDG_CACHE_HOME:-$HOME/.cache}/kvk/cubins; "" when KVK_CACHE is "off" or there is no home.
std::string cache_folder();

// Nothing when there is no such file or the file is damaged (truncated, altered, of another key).
std::optional<Cubin> load_cubin(const std::string& folder, const std::string& key);

// Writes a temporary file and renames it: readers and other writers see the whole file or none. Never throws; false, with
// a line under KVK_LOG, when the folder or the disk does not take it. Clears away what killed writers have left.
bool store_cubin(const std::string& folder, const std::string& key, const Cubin& cubin);

}  // namespace kvk::cuda
