// Products of 8 bits by Intel's AMX: one instruction multiplies 16 rows of x, a group of k and 16 columns. A group's sums are whole
// numbers, so they are the same bits as those of `add_products` (int8.h).

#pragma once

#include "int8.h"
#include "tiles.h"

#if defined(__AMX_INT8__) && defined(__linux__)
#define AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int TILE_BYTES = 64;  // of a tile register's row
static_assert(GROUP == TILE_BYTES && W * sizeof(int32_t) == TILE_BYTES);

// Linux gives these registers to a process that asks for them (Documentation/arch/x86/xstate.rst).
inline bool has_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}

struct TiledInt8 {
    static constexpr int BYTES = COLUMNS * QUAD, TILE_ROWS = 16;

    // As long as it lives, registers 0 and 1 of this thread are sums, 2 rows of x, and 3 and 4 weights.
    class Session {
    public:
        Session() {
            struct {  // LDTILECFG's operand (Intel's manual, volume 2)
                uint8_t palette = 1, start_row = 0, reserved[14] = {};
                uint16_t row_bytes[16] = {TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES};
                uint8_t rows[16] = {TILE_ROWS, TILE_ROWS, TILE_ROWS, QUADS, QUADS};
            } config;
            _tile_loadconfig(&config);
        }
        ~Session() { _tile_release(); }
        Session(const Session &) = delete;
        Session &operator=(const Session &) = delete;
    };
};
static_assert(TiledInt8::TILE_ROWS <= 1 + SPARE_ROWS);

// Whose groups are all whole.
struct TiledRows : RoundedRows {
    TiledRows from(int64_t row) const { return {RoundedRows::from(row)}; }
};

// Of one group.
struct alignas(TILE_BYTES) Sums {
    I whole[2][TiledInt8::TILE_ROWS];

    void multiply(const Rounded *x, int64_t stride, const char *weights) {
        // The same row sixteen times: TILEZERO would wait for the product before it.
        alignas(TILE_BYTES) static const int32_t zeros[W] = {};
        constexpr int BOTH = 2 * TILE_BYTES;
        _tile_loadd(0, zeros, 0);
        _tile_loadd(1, zeros, 0);
        _tile_loadd(2, x, stride);
        _tile_loadd(3, weights, BOTH);
        _tile_dpbsud(0, 2, 3);
        _tile_stored(0, whole[0], TILE_BYTES);
        _tile_loadd(4, weights + TILE_BYTES, BOTH);
        _tile_dpbsud(1, 2, 4);
        _tile_stored(1, whole[1], TILE_BYTES);
    }
};

// A few groups are multiplied before their sums are scaled and added up: of those there are registers for half a panel.
template <class Format, int R, class Ahead>
void multiply_panel(const TiledRows &x, const char *panel, Ahead ahead, F (&sum)[R][2]) {
    constexpr int FEW_GROUPS = 4;
    Sums sums[FEW_GROUPS];
    for (int64_t first = 0; first < x.groups; first += FEW_GROUPS) {
        const int64_t count = std::min<int64_t>(FEW_GROUPS, x.groups - first);
        for (int64_t g = 0; g < count; ++g) {
            sums[g].multiply(x.x + (first + g) * GROUP, x.pieces * QUAD, panel);
            for (int q = 0; q < QUADS; ++q, panel += Format::BYTES) ahead.fetch(panel);
        }
        for (int i = 0; i < 2; ++i) {
            F half[R];
            for (int r = 0; r < R; ++r) half[r] = sum[r][i];
            for (int64_t g = 0; g < count; ++g) {
                const int64_t at = (first + g) * x.rows;
                for (int r = 0; r < R; ++r) {
                    half[r] += x.scale[at + r] * __builtin_convertvector(sums[g].whole[i][r] + x.start[at + r], F);
                }
            }
            for (int r = 0; r < R; ++r) sum[r][i] = half[r];
        }
    }
}

}  // namespace
#endif
