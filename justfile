# What people do here. `just` lists it.
default:
    @just --list

# Formatting and lints
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --profile quick -- -D warnings

# Everything, real kernels included
test:
    ./scripts/test

# A kill at every crash point of a scripted history, and of its recovery
crash:
    cargo test -p ghostswap --profile quick --features crash-points --test crash_points

# The I/O path asks neither the allocator nor the kernel for anything
no-alloc:
    cargo test -p ghostswap --profile quick --test no_alloc

# Models of the lock-free code, through all interleavings
loom *ARGS:
    scripts/loom {{ARGS}}

# The model test under ThreadSanitizer
tsan *ARGS:
    scripts/tsan {{ARGS}}

# What Miri can run
miri:
    scripts/miri

# The main job in a guest
vm *ARGS:
    ./scripts/quickstart {{ARGS}}

# The store against the bare codec, and density under overwrite
bench:
    cargo bench --bench store

# The same hog on zram and on ghostswap, in virtual time
bench-zram:
    scripts/bench/zram

# What parses bytes from outside, guided by coverage: [TARGET [SECONDS]]
fuzz *ARGS:
    scripts/fuzz {{ARGS}}

# What the tests do in little, for hours
torture *ARGS:
    scripts/torture {{ARGS}}

# A tier on a Ceph of one OSD that lives as long as this: [rbd] [s3]
ceph *ARGS:
    ./scripts/ceph-demo {{ARGS}}
