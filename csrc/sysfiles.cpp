#include "sysfiles.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

namespace fourfold {
namespace {

constexpr const char* kBlanks = " \t";

// The integer that text starts with, after blanks; moves `at` past it.
std::optional<int64_t> leading_integer(const std::string& text, size_t& at) {
    at = std::min(text.find_first_not_of(kBlanks, at), text.size());
    int64_t value;
    const auto [end, error] = std::from_chars(text.data() + at, text.data() + text.size(), value);
    if (error != std::errc()) return std::nullopt;
    at = static_cast<size_t>(end - text.data());
    return value;
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string& text) {
    constexpr int64_t kMost = 1 << 16;  // far beyond CONFIG_NR_CPUS: a damaged range must not fill the memory
    std::vector<int> cpus;
    std::istringstream ranges(text);
    for (std::string range; std::getline(ranges, range, ',');) {
        size_t at = 0;
        const auto first = leading_integer(range, at);
        if (!first) continue;
        const bool is_range = at < range.size() && range[at] == '-';
        const auto last = is_range ? leading_integer(range, ++at) : first;
        if (!last || *first < 0 || *last >= kMost) continue;
        for (int64_t cpu = *first; cpu <= *last; ++cpu) cpus.push_back(static_cast<int>(cpu));
    }
    std::sort(cpus.begin(), cpus.end());
    cpus.erase(std::unique(cpus.begin(), cpus.end()), cpus.end());
    return cpus;
}

std::vector<std::string> split_words(const std::string& text) {
    std::istringstream words(text);
    return {std::istream_iterator<std::string>(words), {}};
}

std::vector<int> intersect(const std::vector<int>& a, const std::vector<int>& b) {
    std::vector<int> both;
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
    return both;
}

SysFiles::SysFiles(std::string root) : root_(std::move(root)) {
    while (!root_.empty() && root_.back() == '/') root_.pop_back();
}

bool SysFiles::exists(const std::string& path) const {
    std::error_code ignored;  // unreadable counts as missing
    return std::filesystem::exists(root_ + path, ignored);
}

std::optional<std::string> SysFiles::text(const std::string& path) const {
    std::ifstream file(root_ + path);
    std::ostringstream whole;
    if (!file || !(whole << file.rdbuf())) return std::nullopt;
    std::string text = whole.str();
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
}

std::optional<int64_t> SysFiles::integer(const std::string& path) const {
    size_t at = 0;
    return leading_integer(text(path).value_or(""), at);
}

std::optional<std::vector<int>> SysFiles::cpu_list(const std::string& path) const {
    const auto list = text(path);
    if (!list) return std::nullopt;
    return parse_cpu_list(*list);
}

std::vector<std::string> SysFiles::lines(const std::string& path) const {
    std::vector<std::string> lines;
    std::istringstream file(text(path).value_or(""));
    for (std::string line; std::getline(file, line);) lines.push_back(line);
    return lines;
}

std::optional<std::string> SysFiles::field(const std::string& path, const std::string& key) const {
    for (const std::string& line : lines(path)) {
        if (!line.starts_with(key)) continue;
        const size_t value = line.find_first_not_of(" \t:", key.size());
        if (value == key.size()) continue;  // a longer key
        return value == std::string::npos ? "" : line.substr(value, line.find_last_not_of(kBlanks) + 1 - value);
    }
    return std::nullopt;
}

std::vector<int> SysFiles::numbered(const std::string& directory, const std::string& prefix) const {
    std::vector<int> numbers;
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator(root_ + directory, ignored)) {
        const std::string name = entry.path().filename();
        if (!name.starts_with(prefix)) continue;
        size_t at = prefix.size();
        const auto number = leading_integer(name, at);
        if (number && at == name.size()) numbers.push_back(static_cast<int>(*number));
    }
    std::sort(numbers.begin(), numbers.end());
    return numbers;
}

}  // namespace fourfold
