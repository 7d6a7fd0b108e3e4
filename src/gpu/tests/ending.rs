//! The end of a run over several ranks: nothing is returned that another rank still maps, and nobody waits for ever.

use super::*;

/// What each of two ranks does with a rank that has made steps.
type Ending = fn(usize, Rank) -> Result<()>;

/// Two ranks make the steps of both prompts and end as `ending` says; what it returned, and what the devices were
/// asked to return before its time.
fn end_two_ranks(ending: Ending) -> Vec<(Result<()>, Vec<String>)> {
    let dir = models().join("qwen2-untied");
    let golden = Golden::open(&dir);
    ThreadRanks::each(2, |comm| {
        let rank = comm.rank;
        let standin = Arc::new(Standin::new(Options {
            ordinal: rank as u32,
            ..Options::default()
        }));
        let hidden = ModelConfig::from_dir(&dir).unwrap().hidden_size;
        let parts = Parts::standin(&standin, Some(Box::new(comm)), hidden).unwrap();
        let mut loaded = Rank::load(&dir, 2, rank, parts, LIMITS).unwrap();
        both_prompts(&mut loaded, &golden).unwrap();
        assert!(standin.graphs() > 0);
        let ended = ending(rank, loaded);
        (ended, standin.misuses())
    })
}

fn pause() {
    std::thread::sleep(Duration::from_millis(300));
}

#[test]
fn a_normal_end_waits_for_the_others_mappings() {
    let ends = end_two_ranks(|rank, mut loaded| {
        if rank == 1 {
            pause();
        }
        loaded.0.backend.finish()
    });
    for (ended, misuses) in ends {
        ended.unwrap();
        assert!(misuses.is_empty(), "{misuses:?}");
    }
}

#[test]
fn a_rank_that_fails_waits_for_nobody_and_returns_nothing_that_is_mapped() {
    let ends = end_two_ranks(|rank, mut loaded| {
        if rank == 1 {
            return loaded.0.backend.finish();
        }
        drop(loaded);
        pause();
        Ok(())
    });
    assert!(ends.iter().all(|(_, misuses)| misuses.is_empty()));
    let lost = ends[1].0.as_ref().unwrap_err().to_string();
    assert!(lost.contains("a rank is gone"), "{lost}");
}

/// The stand-in sees what the two tests above look for.
#[test]
fn memory_returned_while_it_is_mapped_is_seen() {
    let (one, two) = (
        Arc::new(Standin::new(Options::default())),
        Standin::new(Options::default()),
    );
    let driver: Arc<dyn Driver> = one.clone();
    let buffer = super::super::memory::DeviceBuffer::new(&driver, 64, "x").unwrap();
    let seen = two.import(&one.export(buffer.ptr()).unwrap()).unwrap();
    drop(buffer);
    assert_eq!(one.misuses().len(), 1, "{:?}", one.misuses());
    // SAFETY: imported above, and nothing uses it.
    unsafe { two.close_import(seen) }.unwrap();
    assert!(two.misuses().is_empty());
}
