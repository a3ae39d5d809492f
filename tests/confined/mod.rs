//! Threads that may ask the process and the kernel for nothing. On a confined thread a call of the
//! C allocator, by Rust or by a C library, or a system call that is not on the thread's list ends
//! the process, with a line that says who did what.
//!
//! The allocator is interposed: `malloc` and its kin are defined here and forward to glibc's own,
//! which every allocation of this program comes to, Rust's included (`std::alloc::System` is glibc's
//! `malloc`). System calls are filtered by seccomp, which a thread cannot take off again: so a
//! confined thread never returns. It parks when it is done, and goes with the process.
#![allow(unsafe_code, reason = "an allocator, a seccomp filter and a signal handler")]

use libc::{c_int, c_void, size_t};
use std::cell::Cell;

/// Status of a process ended by what a confined thread did.
pub const CAUGHT: i32 = 97;
/// A copy of standard error: the one file that a confined thread can write to, to say why it ends.
const REPORT_FD: c_int = 900;

thread_local! {
    /// Name of this thread if it is confined. Without a destructor or a first time: reading it
    /// allocates nothing.
    static CONFINED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Ends the process with a line on standard error, without allocating.
pub fn end(parts: &[&str]) -> ! {
    for part in parts {
        // SAFETY: the bytes of a string; a failed write leaves the status to tell.
        unsafe { libc::write(REPORT_FD, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(CAUGHT) }
}

fn number(mut n: u32, digits: &mut [u8; 10]) -> &str {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 {
            return std::str::from_utf8(&digits[at..]).unwrap_or("?");
        }
    }
}

fn allocator(call: &str) {
    if let Some(thread) = CONFINED.get() {
        end(&["\n", thread, " called ", call, "\n"]);
    }
}

extern "C" {
    fn __libc_malloc(size: size_t) -> *mut c_void;
    fn __libc_calloc(count: size_t, size: size_t) -> *mut c_void;
    fn __libc_realloc(old: *mut c_void, size: size_t) -> *mut c_void;
    fn __libc_memalign(align: size_t, size: size_t) -> *mut c_void;
    fn __libc_free(old: *mut c_void);
}

#[no_mangle]
extern "C" fn malloc(size: size_t) -> *mut c_void {
    allocator("malloc");
    // SAFETY: the caller's arguments, to the function it meant.
    unsafe { __libc_malloc(size) }
}

#[no_mangle]
extern "C" fn calloc(count: size_t, size: size_t) -> *mut c_void {
    allocator("calloc");
    // SAFETY: as above.
    unsafe { __libc_calloc(count, size) }
}

#[no_mangle]
unsafe extern "C" fn realloc(old: *mut c_void, size: size_t) -> *mut c_void {
    allocator("realloc");
    // SAFETY: as above.
    unsafe { __libc_realloc(old, size) }
}

#[no_mangle]
extern "C" fn memalign(align: size_t, size: size_t) -> *mut c_void {
    allocator("memalign");
    // SAFETY: as above.
    unsafe { __libc_memalign(align, size) }
}

#[no_mangle]
extern "C" fn aligned_alloc(align: size_t, size: size_t) -> *mut c_void {
    allocator("aligned_alloc");
    // SAFETY: glibc's aligned_alloc is its memalign.
    unsafe { __libc_memalign(align, size) }
}

#[no_mangle]
unsafe extern "C" fn posix_memalign(out: *mut *mut c_void, align: size_t, size: size_t) -> c_int {
    allocator("posix_memalign");
    // SAFETY: as above; `out` is the caller's to be written.
    unsafe {
        let new = __libc_memalign(align, size);
        if new.is_null() {
            return libc::ENOMEM;
        }
        *out = new;
    }
    0
}

#[no_mangle]
unsafe extern "C" fn free(old: *mut c_void) {
    // Freeing nothing is nothing.
    if !old.is_null() {
        allocator("free");
    }
    // SAFETY: as above.
    unsafe { __libc_free(old) }
}

extern "C" fn on_sigsys(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: of a SIGSYS the kernel fills at byte 24 the number of the call (siginfo_t._sigsys).
    let call = unsafe { info.cast::<u8>().add(24).cast::<u32>().read() };
    let mut digits = [0; 10];
    let name = CONFINED.get().unwrap_or("a thread that is confined no more");
    end(&["\n", name, " made system call number ", number(call, &mut digits), "\n"]);
}

/// To be called once before any thread is confined.
pub fn prepare() {
    // SAFETY: a signal handler that calls write and _exit only; a descriptor nobody else uses.
    unsafe {
        assert_eq!(libc::dup2(2, REPORT_FD), REPORT_FD);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigsys as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()), 0);
    }
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |what| {
        if let (Some(thread), Some(at)) = (CONFINED.get(), what.location()) {
            let mut digits = [0; 10];
            end(&["\n", thread, " panicked at ", at.file(), ":", number(at.line(), &mut digits), "\n"]);
        }
        usual(what);
    }));
}

/// Confines the calling thread for the rest of its life to the calls of `allowed`.
pub fn confine(name: &'static str, allowed: &[libc::c_long]) {
    let ins = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |at: u32| ins(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, 0, 0);
    let skip_unless = |value: u32, n: u8| ins(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, 0, n);
    let answer = |with: u32| ins(libc::BPF_RET | libc::BPF_K, with, 0, 0);
    // struct seccomp_data: the call's number at 0, its first argument at 16.
    let mut filter = vec![load(0)];
    for call in allowed.iter().chain(&[libc::SYS_exit_group]) {
        filter.extend([skip_unless(*call as u32, 1), answer(libc::SECCOMP_RET_ALLOW)]);
    }
    filter.extend([skip_unless(libc::SYS_write as u32, 3), load(16), skip_unless(REPORT_FD as u32, 1)]);
    filter.extend([answer(libc::SECCOMP_RET_ALLOW), answer(libc::SECCOMP_RET_TRAP)]);
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program is live and as long as said; it concerns this thread alone.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let set = libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &program);
        assert_eq!(set, 0, "a seccomp filter: {}", std::io::Error::last_os_error());
    }
    drop(filter);
    CONFINED.set(Some(name));
}

/// Minor and major page faults of a thread of this process so far.
pub fn faults(tid: libc::pid_t) -> (u64, u64) {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap();
    // After the name, which ends with the last parenthesis, come fields 3 and up.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[10 - 3].parse().unwrap(), fields[12 - 3].parse().unwrap())
}

/// Number of the calling thread, for [`faults`].
pub fn tid() -> libc::pid_t {
    // SAFETY: no preconditions.
    unsafe { libc::gettid() }
}
