// Kernels run on made-up numbers; their results, as hexadecimal bits. What it prints is the same on every machine.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace ddpm;

namespace {

constexpr int64_t kSamples = 3, kChannels = 3, kPositions = 173;
const Shape kShape{kSamples, kChannels, kPositions};
const int64_t kSeed[1] = {-7}, kIds[kSamples] = {0, 1, (int64_t(1) << 40) + 5}, kStep[1] = {1};

Image image(std::vector<float>& values, bool channels_last = false) {
    return Image{values.data(), DType::f32, channels_last};
}

void print(const char* name, const void* data, size_t words) {
    std::vector<uint32_t> bits(words);
    std::memcpy(bits.data(), data, 4 * words);
    std::printf("%s", name);
    for (uint32_t word : bits) std::printf(" %08x", word);
    std::printf("\n");
}

}  // namespace

int main() {
    const size_t size = kSamples * kChannels * kPositions;
    const Noise drawn{Image{nullptr, DType::f32, false}, kSeed, kIds, kStep, 5};
    std::vector<float> a(size), b(size), c(size), d(size);
    for (bool channels_last : {false, true}) {
        generic::normal(NormalArgs{kShape, drawn, image(a, channels_last)}, nullptr, 1);
        print(channels_last ? "normal_channels_last" : "normal", a.data(), size);
    }
    std::vector<uint16_t> half(size);
    generic::normal(NormalArgs{kShape, drawn, Image{half.data(), DType::bf16, false}}, nullptr, 1);
    print("normal_bf16", half.data(), size / 2);

    for (size_t i = 0; i < size; ++i) b[i] = float(int(i * 37 % 256)) / 127.5f - 1.0f;
    const int64_t t[kSamples] = {0, 2, 1};
    const float rows[6] = {0.99f, 0.141f, 0.7f, 0.714f, 0.1f, 0.995f};
    generic::q_sample(QSampleArgs{kShape, image(b), t, Table{rows, 3}, drawn, image(c)}, nullptr, 1);
    print("q_sample", c.data(), size);

    float loss[kSamples];
    const float losses[9] = {0.99f, 0.141f, 1.0f, 0.7f, 0.714f, 0.5f, 0.1f, 0.995f, 2.0f};
    const LossArgs arguments{kShape, image(c), image(b), t, Table{losses, 3}, drawn, image(d), loss};
    std::vector<double> workspace(workspace_bytes(arguments, 1) / 8);
    generic::diffusion_loss(arguments, workspace.data(), 1);
    print("diffusion_loss", loss, kSamples);
    print("residual", d.data(), size);
}
