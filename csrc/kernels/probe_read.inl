// The read patterns, once against a dialect. Included in an unnamed namespace, after the dialect: `Lanes`, with Vector,
// zero(), load(const uint8_t*) and add(Vector, Vector) on 64-bit lanes.

constexpr size_t kLine = 64;
constexpr size_t kLines = 4;  // a step of one stream; an accumulator each, so that additions do not wait for each other

template <size_t kStreams, bool kPrefetch>
uint64_t read(const uint8_t* data, size_t n_bytes) {
    const size_t stream_bytes = n_bytes / kStreams;
    Lanes::Vector sums[kLines] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
    for (size_t at = 0; at < stream_bytes; at += kLines * kLine) {
        for (size_t stream = 0; stream < kStreams; ++stream) {
            const uint8_t* step = data + stream * stream_bytes + at;
            for (size_t i = 0; i < kLines; ++i) {
                const uint8_t* line = step + i * kLine;
                if constexpr (kPrefetch) __builtin_prefetch(line + kPrefetchAheadBytes);  // harmless past the end
                for (size_t lane = 0; lane < kLine; lane += sizeof(Lanes::Vector))
                    sums[i] = Lanes::add(sums[i], Lanes::load(line + lane));
            }
        }
    }
    uint64_t words[kLines * sizeof(Lanes::Vector) / sizeof(uint64_t)];
    __builtin_memcpy(words, sums, sizeof(sums));
    uint64_t total = 0;
    for (uint64_t word : words) total += word;
    return total;
}

consteval ReadProbe read_probe(Isa isa) {
    return {isa, {read<1, false>, read<1, true>, read<4, false>, read<4, true>}};  // in the order of ReadPattern
}
