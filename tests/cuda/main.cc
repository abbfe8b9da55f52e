#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <sstream>

#include "cases.h"
#include "cuda/sources.h"

// What the library carries in kvk: here, a file that only the fake NVRTC reads.
const kvk::cuda::EmbeddedSource kvk::cuda::kEmbeddedSources[] = {{"kvk/device/probe.cuh", "// probe\n"},
                                                                 {nullptr, nullptr}};

std::string test::stderr_of(const std::function<void()>& body) {
  const TemporaryFolder folder;
  const std::string path = folder.file("stderr");
  std::fflush(stderr);
  const int before = dup(2), file = open(path.c_str(), O_CREAT | O_RDWR, 0600);
  dup2(file, 2);
  body();
  std::fflush(stderr);
  dup2(before, 2);
  close(before);
  close(file);
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "--list";
  if (name == "--list") {
    for (const auto& [known, body] : test::cases()) std::printf("%s\n", known.c_str());
    return 0;
  }
  const auto chosen = test::cases().find(name);
  if (chosen == test::cases().end()) {
    std::fprintf(stderr, "no case '%s'\n", name.c_str());
    return 2;
  }
  try {
    chosen->second();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "FAILED: %s\n", error.what());
    return 2;
  }
  std::printf("%s: checks=%lld failures=%lld\n", name.c_str(), static_cast<long long>(test::counts.checks),
              static_cast<long long>(test::counts.failures));
  return test::counts.failures == 0 && test::counts.checks > 0 ? 0 : 1;
}
