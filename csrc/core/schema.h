// The schemas of torch.ops.kvk as data: names, types and defaults of an op's arguments, for those who handle any op (the
// recorder, the array face).
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvk {

struct SchemaArgument {
  std::string name;
  std::string type;           // "Tensor", "Tensor?", "int", "float?", "bool", "int[]", "ScalarType", "str"; no alias
  std::optional<std::string>  // as the schema writes it: "None", "-1", "0.0", "True"
      default_value;
  bool written = false;  // Tensor(a!)
  bool keyword_only = false;
};

struct Schema {
  std::string name;      // "paged_decode"
  std::string overload;  // "out", or empty
  std::vector<SchemaArgument> arguments;
  int results = 0;

  // A tensor that the op only writes: a keyword-only one of an .out form. Other written ones it changes in place.
  bool is_output(const SchemaArgument& argument) const {
    return argument.written && argument.keyword_only && overload == "out";
  }
};

// "name.overload(Tensor a, *, int b=1) -> (Tensor c)"; a schema that torch takes.
Schema parse_schema(std::string_view text);

}  // namespace kvk
