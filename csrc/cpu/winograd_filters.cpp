// The filters of Winograd's convolution at its 36 points, G g G^T, in the order in which the products fetch them.
#include "winograd.h"

namespace ddpm {
namespace DDPM_ISA {

static inline void filter_rows(const float* __restrict g, int64_t step, float* __restrict to, int64_t distance) {
    const float* __restrict g0 = g;
    const float* __restrict g1 = g + step;
    const float* __restrict g2 = g + 2 * step;
    float* __restrict t0 = to;
    float* __restrict t1 = to + distance;
    float* __restrict t2 = to + 2 * distance;
    float* __restrict t3 = to + 3 * distance;
    float* __restrict t4 = to + 4 * distance;
    float* __restrict t5 = to + 5 * distance;
#pragma omp simd
    for (int k = 0; k < kWinogradPanel; ++k)
        ddpm::winograd_filter(g0[k], g1[k], g2[k], t0[k], t1[k], t2[k], t3[k], t4[k], t5[k]);
}

constexpr int kChannels = 16;  // whose filters are gathered at a time: where they lie side by side, a cache line or two

// The taps of a panel's filters of `count` channels.
template <class Storage>
static void gather(const WinogradFiltersArgs& args, int64_t out, int64_t channel, int count,
                   float (&taps)[kChannels][9][kWinogradPanel]) {
    using Type = typename Storage::Type;
    const int length = at_most(args.out_channels - out, kWinogradPanel);
    const Type* const weight =
        static_cast<const Type*>(args.weight) + out * args.out_stride + channel * args.channel_stride;
    for (int tap = 0; tap < 9; ++tap) {
        const Type* const from = weight + tap / 3 * args.row_stride + tap % 3 * args.column_stride;
        if (args.out_stride == 1) {
            for (int c = 0; c < count; ++c)
                for (int k = 0; k < length; ++k) taps[c][tap][k] = Storage::load(from[c * args.channel_stride + k]);
        } else {
            for (int k = 0; k < length; ++k)
                for (int c = 0; c < count; ++c)
                    taps[c][tap][k] = Storage::load(from[k * args.out_stride + c * args.channel_stride]);
        }
    }
}

template <class Storage>
static void transform_filters(const WinogradFiltersArgs& args, int threads) {
    const int64_t panels = winograd_panels(args.out_channels);
    const int64_t distance = args.channels * kWinogradPanel;  // from point to point
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t channel = 0; channel < args.channels; channel += kChannels) {
            alignas(64) float taps[kChannels][9][kWinogradPanel] = {}, columns[6][3][kWinogradPanel];
            const int count = at_most(args.channels - channel, kChannels);
            gather<Storage>(args, panel * kWinogradPanel, channel, count, taps);
            float* to = args.filters + panel * kWinogradPoints * distance + channel * kWinogradPanel;
            for (int c = 0; c < count; ++c, to += kWinogradPanel) {
                for (int j = 0; j < 3; ++j)
                    filter_rows(taps[c][j], 3 * kWinogradPanel, columns[0][j], 3 * kWinogradPanel);
                for (int i = 0; i < 6; ++i) filter_rows(columns[i][0], kWinogradPanel, to + 6 * i * distance, distance);
            }
        }
}

void winograd_filters(const WinogradFiltersArgs& args, void*, int threads) {
    for_storage(args.dtype, [&](auto storage) { transform_filters<decltype(storage)>(args, threads); });
}

}  // namespace DDPM_ISA
}  // namespace ddpm
