// The small text files in which Linux describes the computer, below a root that tests can replace.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fourfold {

// "0-3,8" -> {0, 1, 2, 3, 8}, ascending and each once; what is not a number is passed over.
std::vector<int> parse_cpu_list(const std::string& text);
// The words between blanks.
std::vector<std::string> split_words(const std::string& text);
// a ∩ b, both ascending.
std::vector<int> intersect(const std::vector<int>& a, const std::vector<int>& b);

class SysFiles {
  public:
    explicit SysFiles(std::string root);

    bool is_live() const { return root_.empty(); }  // the running kernel's own, not a copy
    bool exists(const std::string& path) const;
    // Whole, without the trailing newline; none where the file is missing or unreadable. Paths begin with "/".
    std::optional<std::string> text(const std::string& path) const;
    // The leading integer; none for a missing file and for a word such as "max".
    std::optional<int64_t> integer(const std::string& path) const;
    std::optional<std::vector<int>> cpu_list(const std::string& path) const;
    // The lines of a file; none of them where it is missing.
    std::vector<std::string> lines(const std::string& path) const;
    // The text after "key:" or "key " at the start of a line ("MemTotal:  7 kB", "file 7"), without surrounding blanks.
    std::optional<std::string> field(const std::string& path, const std::string& key) const;
    // Numbers n for which directory/prefix<n> exists, ascending.
    std::vector<int> numbered(const std::string& directory, const std::string& prefix) const;

  private:
    std::string root_;  // without its last slash
};

}  // namespace fourfold
