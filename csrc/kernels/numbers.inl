// Between a caller's numbers and float32, against the dialect; to nearest even. Bound by loads and stores.

void widen(NumberType type, const void* from, size_t n, float* to) {
    if (type == NumberType::f32) {
        std::memcpy(to, from, n * sizeof(float));
        return;
    }
    const auto* words = static_cast<const uint16_t*>(from);
    size_t i = 0;
    if (type == NumberType::f16) {
        for (; i + kLanes <= n; i += kLanes) store(to + i, load_half(words + i));
        for (; i < n; ++i) to[i] = from_half(words[i]);
    } else {
        for (; i + kLanes <= n; i += kLanes) store(to + i, load_bf16(words + i));
        for (; i < n; ++i) to[i] = std::bit_cast<float>(static_cast<uint32_t>(words[i]) << 16);
    }
}

void narrow(NumberType type, const float* from, size_t n, void* to) {
    if (type == NumberType::f32) {
        std::memcpy(to, from, n * sizeof(float));
        return;
    }
    auto* words = static_cast<uint16_t*>(to);
    size_t i = 0;
    if (type == NumberType::f16) {
        for (; i + kLanes <= n; i += kLanes) store_half(words + i, load(from + i));
        for (; i < n; ++i) words[i] = to_half(from[i]);
    } else {
        for (; i < n; ++i) words[i] = to_bf16(from[i]);  // compilers make vectors of this
    }
}
