//! Histories of what only some stores have: tiers that come and go, two disks, dictionaries; and the walks over them.

use super::*;

// --- tiers that come and go -------------------------------------------------------------------------

/// What happens on each of the stores that have the arena in turn: without a tier below, with one, without, with another;
/// by another codec and back.
fn stores(file: &str) -> Vec<(String, Vec<Op>)> {
    use Op::*;
    let ram = "ram,limit=4M,codec=lz4";
    let disk = |name: &str| format!("{ram} + file:{file}{name},size=16M,prealloc=off");
    vec![
        (ram.into(), vec![Create, Create, Write(0, 0, 34, RAW), Write(1, 0, 20, SMALL)]),
        (disk("a"), vec![Demote, Write(0, 34, 20, MIDDLE), Write(0, 0, 3, RAW), Drain]),
        (ram.into(), vec![Write(1, 20, 10, RAW), Clean]),
        (disk("b"), vec![Demote, Write(1, 5, 20, MIDDLE), Drain]),
        // At once in the place of the other.
        (disk("a"), vec![Demote, Write(0, 2, 10, SMALL)]),
        (disk("a").replace("lz4", "zstd:1"), vec![Write(0, 8, 6, MIDDLE), Demote]),
        (disk("a"), vec![Write(1, 5, 4, SMALL)]),
        // Another above it, which then holds all, so that the first can go.
        (disk("b") + &disk("a")[ram.len()..], vec![Clean, Demote, PassBack, PassBack, Write(0, 3, 9, RAW)]),
        (disk("a") + &disk("b")[ram.len()..], vec![Clean, Write(1, 9, 4, SMALL), Drain]),
        (disk("b"), vec![Clean, Demote, Write(1, 5, 4, SMALL)]),
    ]
}

/// Stops the stores' history at its `target`th point, then the opening of the next, with the tiers that were being
/// opened or with those before, at its `again`th. Returns the points' names; the first None: it came to its end.
fn change_stopped(file: &str, target: u64, again: u64) -> (Option<&'static str>, Option<&'static str>) {
    let arena = create_arena(false).unwrap();
    let entries = entries();
    let ledger = Ledger::new(entries.len());
    let stores = stores(file);
    let at = STOPPED_AT.get().unwrap().at(2);
    let first = stopped_at(target, || {
        let mut version = 1 << 20;
        for (n, (tier, ops)) in stores.iter().enumerate() {
            at.store(n as u64, Ordering::SeqCst);
            let mut player = Player::open(&arena, tier, &ledger, &entries);
            player.version = version;
            player.open_lanes();
            ops.iter().for_each(|op| player.play(*op));
            version = player.version;
        }
    });
    let n = at.load(Ordering::SeqCst) as usize;
    // Every other time the tiers before are tried first. Where something lies on one that they do not have, they are
    // refused, and nothing is lost by that.
    let before = (target % 2 == 1).then(|| stores[n.saturating_sub(1)].0.as_str());
    let open = || {
        let old = before.and_then(|tier| Steps::open(config(tier), arena.try_clone().unwrap()).ok());
        let (store, steps) =
            old.unwrap_or_else(|| Steps::open(config(&stores[n].0), arena.try_clone().unwrap()).unwrap());
        Player { store, steps, lanes: Vec::new(), ledger: &ledger, entries: &entries, version: 1 << 20 }
    };
    let second = stopped_at(again, || drop(open()));
    let outcome = std::panic::catch_unwind(|| {
        let mut player = open();
        player.check();
        player.go_on();
    });
    if outcome.is_err() {
        panic!("tiers: stopped at point {target}, {first:?}, in store {n}, and in the next at {again}, {second:?}");
    }
    (first, second)
}

/// At every point that only a change of tiers has, and in the next opening at each of those in turn. Then at one in
/// thirteen of all.
pub(super) fn walk_stores(file: &str, visited: &Mutex<BTreeSet<String>>) {
    let mut stops = 0;
    let mut stop = |target, again| {
        let (first, second) = change_stopped(file, target, again);
        stops += 1;
        visited.lock().unwrap().extend(first.into_iter().chain(second).map(str::to_string));
        (first, second)
    };
    OF_TIERS.store(true, Ordering::Relaxed);
    let mut of_tiers = 0;
    while stop(of_tiers, 0).0.is_some() {
        for again in 1.. {
            if stop(of_tiers, again).1.is_none() {
                break;
            }
        }
        of_tiers += 1;
    }
    OF_TIERS.store(false, Ordering::Relaxed);
    let mut target = 0;
    while stop(target, target * 7 % 31).0.is_some() {
        target += 13;
    }
    println!("tiers: {of_tiers} points of a change, {target} points in all, {stops} stops");
}

// --- two disks --------------------------------------------------------------------------------------

/// Segments go down to the first, on to the second, and back; some die on the way.
fn of_two() -> Vec<Op> {
    use Op::*;
    vec![
        Create,
        Create,
        Write(0, 0, 34, RAW),
        Demote,
        Write(0, 34, 20, MIDDLE),
        PassOn,
        Write(1, 0, 40, RAW),
        Reopen,
        Demote,
        Discard(0, 9, 4),
        Write(0, 0, 5, SMALL),
        PassOn,
        PassOn,
        Clean,
        PassBack,
        Demote,
        Compact,
        Discard(1, 5, 30),
        Clean,
        PassOn,
        CloseCleaner,
        Drain,
        Clean,
    ]
}

/// At every point of it, and in the recovery from it at one; and at each point that only tiers have with the other order
/// of the two in the next store.
pub(super) fn walk_two(ram: &str, [a, b]: [&str; 2], visited: &Mutex<BTreeSet<String>>) {
    let tier = format!("{ram} + {a} + {b}");
    let other = format!("{ram} + {b} + {a}");
    let mut target = 0;
    loop {
        let next = if target % 2 == 1 { &other } else { &tier };
        let (first, second) = stop_twice_and_open(&tier, &of_two(), target, target * 7 % 31, next);
        visited.lock().unwrap().extend(first.into_iter().chain(second).map(str::to_string));
        if first.is_none() {
            break;
        }
        target += 1;
    }
    println!("two disks: {target} points");
}

// --- dictionaries -----------------------------------------------------------------------------------

/// One is trained, used, followed by another, and dropped when nothing needs it; some of it lies on disk.
fn of_dictionaries() -> Vec<Op> {
    use Op::*;
    vec![
        Create,
        Create,
        Write(0, 0, 64, WORDS),
        Write(1, 0, 32, WORDS),
        Reopen,
        Train,
        Write(0, 0, 30, WORDS),
        Write(0, 34, 10, MIDDLE),
        Sectors(0, 3, 2, 5, MIDDLE),
        Discard(0, 36, 5),
        Reopen,
        Demote,
        // What was made without one is made anew with it.
        Clean,
        CloseCleaner,
        Write(0, 0, 64, OTHERS),
        Write(1, 0, 64, OTHERS),
        Reopen,
        Train,
        Write(0, 0, 50, OTHERS),
        Compact,
        Write(1, 0, 40, OTHERS),
        Write(0, 512, 20, RAW),
        Reopen,
        CloseCleaner,
        Clean,
        CloseCleaner,
        Drain,
        Clean,
        Write(0, 50, 14, OTHERS),
        Write(1, 40, 24, SMALL),
        Reopen,
        Clean,
        CloseCleaner,
        Clean,
        Drop,
        GiveBack,
    ]
}

/// At every point that only a dictionary has, and in the recovery from it at one in seven; then at one in eleven of all.
pub(super) fn walk_dictionaries(tier: &str, visited: &Mutex<BTreeSet<String>>) {
    let mut stops = 0;
    let mut stop = |target, again| {
        let (first, second) = stop_twice(tier, &of_dictionaries(), target, again);
        stops += 1;
        visited.lock().unwrap().extend(first.into_iter().chain(second).map(str::to_string));
        (first, second)
    };
    OF_DICTIONARIES.store(true, Ordering::Relaxed);
    let mut points = 0;
    while stop(points, 0).0.is_some() {
        points += 1;
    }
    OF_DICTIONARIES.store(false, Ordering::Relaxed);
    let mut target = 0;
    while stop(target, target * 7 % 31).0.is_some() {
        target += 11;
    }
    println!("{tier}: {points} points of dictionaries, {target} points in all, {stops} stops");
}
