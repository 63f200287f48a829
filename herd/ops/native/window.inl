// Pages of global layers that lie in a mapped file: how much of it is in this process's memory, and when that is let go.
//
// Letting go loses nothing: the system keeps what it has room for, writes the rest to the file, and reads it back when it is touched again.
// The trap is that the system maps more than was asked for: all that it has of the 64 KB around the byte that was read. So these blocks are
// what is counted here. From version 6.18 on Linux also maps the whole of what it read in one piece, up to 2 MB; `mapped.py` tells it to
// read ahead nothing of its own, and what is asked for here comes in single pages.

struct HerdFile {
  char* base;
  int64_t bytes;
  int64_t window;   // bytes of it that may be in memory at once
  int64_t touched;  // since all was let go; no less than what is in memory
};

class Window {
 public:
  Window(HerdFile& file, const HerdPages& p, int64_t head_width, const HerdReach& reach, int64_t sequences)
      : file(file), reach(reach), sequences(sequences) {
    const int64_t rows = p.kv_heads * p.page_tokens, width = kv_bytes(p.kind);
    for (void* data : {p.keys, p.values}) parts.push_back({static_cast<const char*>(data), rows * head_width * width});
    if (p.kind == kInt8)
      for (float* data : {p.key_scales, p.value_scales}) parts.push_back({reinterpret_cast<const char*>(data), rows * 4});
  }

  // Make room for the slots that a step's new tokens are written to.
  void open_new(const HerdStep& step) {
    Blocks64 counted(parts.size() * size_t(sequences));
    int64_t bytes = 0;
    each_table([&](int64_t b, const int64_t* pages, int64_t length) {
      bytes += count(counted, b, pages, length - step.counts[b], length);
    });
    make_room(bytes);
  }

  // Make room for spans [first, last) of all sequences, or for as many of them as half of the window takes, at least one; the last one's
  // end. What comes after them is asked for ahead.
  int64_t open(int64_t first, int64_t last) {
    Blocks64 counted(parts.size() * size_t(sequences));
    int64_t bytes = 0, stop = first;
    for (; stop < last; ++stop) {
      int64_t more = 0;
      each_table([&](int64_t b, const int64_t* pages, int64_t length) {
        more += count(counted, b, pages, std::min(length, stop * kSpan), std::min(length, (stop + 1) * kSpan));
      });
      if (stop > first && bytes + more > file.window / 2) break;
      bytes += more;
    }
    if (make_room(bytes) && first == 0) ask_for(0, stop);
    if (stop < last) ask_for(stop, std::min(last, 2 * stop - first));
    return stop;
  }

 private:
  struct Part {  // of every page, in one of the layer's tensors
    const char* data;
    int64_t bytes;  // of a page
  };
  using Blocks64 = std::vector<uintptr_t>;  // [sequences, parts] the last block of 64 KB that was counted; 0: none yet
  static constexpr uintptr_t kBlock = uintptr_t(1) << 16;

  template <class F>
  void each_table(F&& f) const {
    const int64_t* pages = reach.pages;
    for (int64_t b = 0; b < sequences; pages += reach.num_pages[b], ++b) f(b, pages, reach.lengths[b]);
  }

  // Blocks of 64 KB in which keys [start, stop) of a table lie, in order, neighbours that are the same only once.
  template <class F>
  void each_block(Blocks64& counted, int64_t b, const int64_t* pages, int64_t start, int64_t stop, F&& f) const {
    for (int64_t page = start / reach.page_tokens; page * reach.page_tokens < stop; ++page)
      for (size_t i = 0; i < parts.size(); ++i) {
        uintptr_t& before = counted[size_t(b) * parts.size() + i];
        const uintptr_t begin = reinterpret_cast<uintptr_t>(parts[i].data + pages[page] * parts[i].bytes);
        for (uintptr_t block = begin / kBlock; block <= (begin + uintptr_t(parts[i].bytes) - 1) / kBlock; ++block)
          if (block != before) f(i, before = block);
      }
  }

  int64_t count(Blocks64& counted, int64_t b, const int64_t* pages, int64_t start, int64_t stop) const {
    int64_t bytes = 0;
    each_block(counted, b, pages, start, stop, [&](size_t, uintptr_t) { bytes += int64_t(kBlock); });
    return bytes;
  }

  // Whether all was let go for it.
  bool make_room(int64_t bytes) {
    const bool is_full = file.touched + bytes > file.window;
    if (is_full) {
#ifdef __linux__
      madvise(file.base, size_t(file.bytes), MADV_DONTNEED);
#endif
      file.touched = 0;
    }
    file.touched += bytes;
    return is_full;
  }

  // Let the system read spans [first, last) of all sequences from the disk while others are computed.
  void ask_for(int64_t first, int64_t last) const {
    Blocks64 counted(parts.size() * size_t(sequences));
    struct Run {
      uintptr_t low = 1, high = 0;  // blocks
    };
    std::vector<Run> runs(parts.size());
    const auto ask = [&](Run& run) {
      if (run.low > run.high) return;
#ifdef __linux__
      const uintptr_t base = reinterpret_cast<uintptr_t>(file.base), end = base + uintptr_t(file.bytes);
      const uintptr_t low = std::max(base, run.low * kBlock), high = std::min(end, (run.high + 1) * kBlock);
      madvise(reinterpret_cast<void*>(low), high - low, MADV_WILLNEED);
#endif
      run = {};
    };
    each_table([&](int64_t b, const int64_t* pages, int64_t length) {
      each_block(counted, b, pages, std::min(length, first * kSpan), std::min(length, last * kSpan), [&](size_t i, uintptr_t block) {
        Run& run = runs[i];  // tables go up or, where a sequence gave its pages back, down
        if (run.low > run.high || block + 1 < run.low || block > run.high + 1) ask(run), run = {block, block};
        else run = {std::min(run.low, block), std::max(run.high, block)};
      });
    });
    for (Run& run : runs) ask(run);
  }

  HerdFile& file;
  const HerdReach& reach;
  const int64_t sequences;
  std::vector<Part> parts;
};
