//! Intel AMX: 16×16 sums in a tile, 16×32 bf16 times 32×16 bf16 in one instruction.
//!
//! The intrinsics are not stable yet, inline assembly is. Tiles keep nothing between two calls: each configures what it
//! uses and releases it, so a thread that is switched out has no tile state to save.

use std::arch::asm;
use std::sync::OnceLock;

/// Tile configuration: palette 1, eight tiles of 16 rows of 64 bytes (Intel SDM vol. 1, §18.3).
#[repr(C, align(64))]
struct Config([u8; 64]);

static CONFIG: Config = {
    let mut bytes = [0u8; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    Config(bytes)
};

/// Whether the CPU has AMX-BF16 and the kernel lets this process use it. Asks for permission on the first call.
pub(super) fn is_permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| has_bf16_tiles() && request_permission())
}

fn has_bf16_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    let leaves = __cpuid(0).eax;
    // CPUID.(7,0):EDX bit 22 is AMX-BF16, bit 24 AMX-TILE.
    leaves >= 7 && __cpuid_count(7, 0).edx & (1 << 22 | 1 << 24) == (1 << 22 | 1 << 24)
}

/// Tile data are a state component that Linux grants per process, on request.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const SYS_ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: the system call reads its two arguments, which are numbers, and writes no memory.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// Holds the tile configuration of the thread.
pub(super) struct Tiles(());

impl Tiles {
    /// # Safety
    /// [`is_permitted`] must have returned true.
    pub(super) unsafe fn configure() -> Self {
        // SAFETY: the configuration is valid and 64 bytes long; the caller vouches for the instructions.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) }
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a value of this type exists only where the instructions do.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}

/// `c[i][j] += Σ a[i]·b[j]` over `count` pairs of tiles, i and j in 0..2.
///
/// Rows of a tile of `a` are 64 bytes apart and its second tile 1024; rows of `b` and `c` are `row` bytes apart. `b[1]` begins
/// `B_SECOND` bytes after `b[0]`, `c[i][j]` begins `i·DOWN + j·ACROSS` bytes after `c`. Along the sum `a` and `b` advance by
/// `a_step` and `b_step` bytes.
///
/// # Safety
/// All tiles must be in bounds, and a [`Tiles`] alive on this thread.
#[inline(always)]
pub(super) unsafe fn multiply_add<const B_SECOND: usize, const DOWN: usize, const ACROSS: usize>(
    a: (*const u16, usize),
    b: (*const u16, usize),
    row: usize,
    c: *mut f32,
    count: usize,
) {
    if count == 0 {
        return;
    }
    // SAFETY: the caller vouches for bounds and tiles. Compiled code never uses tile registers, so nothing else of the
    // program can be in them.
    unsafe {
        asm!(
            "tileloadd tmm0, [{c} + {row}*1]",
            "tileloadd tmm1, [{c} + {row}*1 + {across}]",
            "tileloadd tmm2, [{c} + {row}*1 + {down}]",
            "tileloadd tmm3, [{c} + {row}*1 + {down} + {across}]",
            "2:",
            "tileloadd tmm4, [{a} + {a_row}*1]",
            "tileloadd tmm6, [{b} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {row}*1 + {b_second}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a} + {a_row}*1 + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, {a_step}",
            "add {b}, {b_step}",
            "dec {count}",
            "jnz 2b",
            "tilestored [{c} + {row}*1], tmm0",
            "tilestored [{c} + {row}*1 + {across}], tmm1",
            "tilestored [{c} + {row}*1 + {down}], tmm2",
            "tilestored [{c} + {row}*1 + {down} + {across}], tmm3",
            b_second = const B_SECOND,
            down = const DOWN,
            across = const ACROSS,
            c = in(reg) c,
            row = in(reg) row,
            a = inout(reg) a.0 => _,
            a_row = in(reg) 64usize,
            a_step = in(reg) a.1,
            b = inout(reg) b.0 => _,
            b_step = in(reg) b.1,
            count = inout(reg) count => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
