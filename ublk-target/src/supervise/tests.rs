//! What the supervisor makes of what its worker says, and of its end.

use super::*;
use clap::Parser;

/// A supervisor with a worker of which the test holds the other end.
fn hearing(test: impl FnOnce(&mut Supervisor<'_>, UnixStream)) {
    let cli = crate::cli::Cli::parse_from(["ghostswap-ublk", "add", "--size", "1G"]);
    let crate::cli::Command::Add(add) = cli.command else { panic!("not add") };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let arena = std::fs::File::open("/dev/null").unwrap().into();
    let shared = Arc::new(Shared::new().unwrap());
    test(&mut Supervisor::new(&add, arena, shared, None, Worker::new(0, ours)), theirs);
}

#[test]
fn what_comes_in_one_piece_is_heard_at_once() {
    hearing(|supervisor, mut worker| {
        worker.write_all(b"ready\nlive 1 3 true /dev/ublkb3\n").unwrap();
        supervisor.hear().unwrap();
        assert_eq!(supervisor.device, Some((3, "/dev/ublkb3".into())));
        assert!(supervisor.recoverable);
    });
}

#[test]
fn half_a_line_of_a_dead_worker_is_nothing() {
    hearing(|supervisor, mut worker| {
        worker.write_all(b"live 1 3 true /dev/ublkb3\nlive 1 3 fal").unwrap();
        drop(worker);
        supervisor.hear().unwrap();
        supervisor.hear_last_words().unwrap();
        assert!(supervisor.recoverable);
        assert_eq!(supervisor.device, Some((3, "/dev/ublkb3".into())));
    });
}

#[test]
fn a_device_that_was_to_go_and_went_is_no_loss() {
    hearing(|supervisor, mut worker| {
        // A number that no device has.
        worker.write_all(b"live 1 4000000 true /dev/ublkb4000000\n").unwrap();
        supervisor.hear().unwrap();
        drop(worker);
        let killed = Some(libc::SIGKILL);
        assert!(supervisor.worker_ended(killed).is_err(), "the device is gone, and nobody asked for it");
        supervisor.shared.board.stopping.store(1, Ordering::Relaxed);
        assert!(supervisor.worker_ended(killed).unwrap());
        assert!(supervisor.worker_ended(None).unwrap(), "likewise of a worker that is another's child");
    });
}

#[test]
fn who_hangs_has_lived_and_who_never_got_live_has_not() {
    hearing(|supervisor, mut worker| {
        assert_eq!(supervisor.active.lived(), Duration::ZERO);
        worker.write_all(b"live 1 4000000 true /dev/ublkb4000000\n").unwrap();
        supervisor.hear().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        // Killed for hanging: noted at once, though it may take long to end.
        supervisor.died = Some(Instant::now());
        assert!(supervisor.active.lived() >= Duration::from_millis(20));
        let lived = supervisor.active.lived();
        supervisor.short_lives = CHANCE;
        supervisor.pause_after(lived + SHORT_LIFE);
        assert_eq!(supervisor.short_lives, 0, "so its successor is ordered without a pause, however often that was");
    });
}

#[test]
fn tiers_that_nobody_got_live_with_give_way_to_those_before() {
    hearing(|supervisor, _worker| {
        let (shared, list) = (supervisor.shared.clone(), "ram\nblock:/dev/x");
        assert!(shared.switch_tiers(Some(list)));
        // That the one before was killed for hanging, and not for them, is no reason yet.
        assert!(supervisor.settle_tiers(true));
        assert_eq!(shared.tiers().as_deref(), Some(list));
        // Nor is the death of whoever serves, ordered by an earlier supervisor: he may have been live with them.
        assert!(!supervisor.settle_tiers(false));
        assert_eq!(shared.tiers().as_deref(), Some(list));
        for (holds, count) in [(None, 0), (Some(list), 2), (None, 0)] {
            supervisor.settle_tiers(true);
            assert_eq!((shared.tiers().as_deref(), supervisor.tiers.len()), (holds, count));
        }
        supervisor.tiers_hold();
        supervisor.settle_tiers(true);
        assert_eq!(shared.tiers(), None, "what is live has settled it");
    });
}

#[test]
fn what_a_trial_said_before_it_died_is_the_reason() {
    hearing(|supervisor, _worker| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        supervisor.standbys.push(Worker { trial: true, ..Worker::new(0, ours) });
        assert!(supervisor.shared.ask_tiers("ram\nblock:/dev/x", 7));
        supervisor.change = Some(Change::of(7, "ram\nblock:/dev/x"));
        theirs.write_all(b"error it is in use\n").unwrap();
        drop(theirs);
        supervisor.standby_died(0, "ended with status 1");
        assert_eq!(supervisor.shared.tiers_done(), (7, "it is in use".into()));
        assert!(supervisor.can_change() && supervisor.standbys.is_empty());
        supervisor.end_change_of_another();
        assert_eq!(supervisor.shared.tiers_done().1, "it is in use", "it has come to its end");
    });
}
