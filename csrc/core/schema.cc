#include "core/schema.h"

namespace kvk {
namespace {

// The parts between commas that stand in no bracket.
std::vector<std::string_view> split(std::string_view list) {
  std::vector<std::string_view> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i <= list.size(); ++i) {
    if (i < list.size()) {
      if (list[i] == '(' || list[i] == '[') ++depth;
      if (list[i] == ')' || list[i] == ']') --depth;
      if (list[i] != ',' || depth > 0) continue;
    }
    std::string_view part = list.substr(begin, i - begin);
    while (!part.empty() && part.front() == ' ') part.remove_prefix(1);
    if (!part.empty()) parts.push_back(part);
    begin = i + 1;
  }
  return parts;
}

SchemaArgument parse_argument(std::string_view text) {
  SchemaArgument argument;
  const size_t space = text.find(' ');
  std::string_view type = text.substr(0, space), rest = text.substr(space + 1);
  argument.written = type.find('!') != std::string_view::npos;
  if (const size_t alias = type.find('('); alias != std::string_view::npos) {
    argument.type = std::string(type.substr(0, alias)) + std::string(type.substr(type.find(')') + 1));
  } else {
    argument.type = type;
  }
  const size_t equals = rest.find('=');
  argument.name = rest.substr(0, equals);
  if (equals != std::string_view::npos) argument.default_value = rest.substr(equals + 1);
  return argument;
}

}  // namespace

Schema parse_schema(std::string_view text) {
  Schema schema;
  const size_t open = text.find('('), close = text.rfind(") ->");
  const std::string_view name = text.substr(0, open);
  const size_t dot = name.find('.');
  schema.name = name.substr(0, dot);
  if (dot != std::string_view::npos) schema.overload = name.substr(dot + 1);
  bool keyword_only = false;
  for (const std::string_view part : split(text.substr(open + 1, close - open - 1))) {
    if (part == "*") {
      keyword_only = true;
      continue;
    }
    schema.arguments.push_back(parse_argument(part));
    schema.arguments.back().keyword_only = keyword_only;
  }
  std::string_view results = text.substr(close + 4);
  while (!results.empty() && results.front() == ' ') results.remove_prefix(1);
  if (!results.empty() && results.front() == '(') results = results.substr(1, results.rfind(')') - 1);
  schema.results = static_cast<int>(split(results).size());
  return schema;
}

}  // namespace kvk
