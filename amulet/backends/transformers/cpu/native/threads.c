/* Helpers for a decode step: hundreds of products of some 50 microseconds each, one after another.

   OpenMP's threads wait for each other at the end of each, so a core that another program uses
   delays all of them; and GNU's OpenMP lets them sleep once two threads of a program have computed.
   Here the caller takes over tasks that no helper has begun, and waits only for helpers at work.
   There is one team; a second concurrent caller does its tasks by itself. */

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>

#include <immintrin.h>
#include <omp.h>

#include "threads.h"

enum { SPINS = 20000 }; /* pauses before a helper sleeps, up to a millisecond */
enum { PATIENCE = 2000 }; /* pauses that a second caller waits for the team */

/* Tasks are dealt out in advance, so that those of a worker are adjacent in memory: taking turns
   makes products some 1.4 times as slow. A worker that is done takes over what others have not begun. */
struct share {
    _Alignas(64) atomic_long next;
    long end;
};

struct job {
    task_of *task;
    void *argument;
    int workers;
    struct share *shares; /* one per worker */
};

static struct {
    _Alignas(64) atomic_long round; /* odd while there are tasks */
    _Alignas(64) atomic_int inside;
    _Alignas(64) atomic_int asleep; /* helpers asleep, among those that `most` allows */
    atomic_int most;                /* the number of helpers that take part */
    _Alignas(64) atomic_flag taken;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int helpers;
    struct job job;
} team = {.taken = ATOMIC_FLAG_INIT, .mutex = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

/* Threads for this thread's tasks, itself included, as many as its OpenMP had; 0: not in the team. */
static _Thread_local int threads;

static void deal_out(long count, struct job *job)
{
    for (long w = 0; w < job->workers; w++) {
        atomic_init(&job->shares[w].next, count * w / job->workers);
        job->shares[w].end = count * (w + 1) / job->workers;
    }
}

static void work(const struct job *job, int worker)
{
    long task;
    for (int w = 0; w < job->workers; w++) {
        struct share *share = job->shares + (worker + w) % job->workers;
        while ((task = atomic_fetch_add(&share->next, 1)) < share->end)
            job->task(job->argument, task, worker);
    }
}

static int is_idle(long number, long done)
{
    long round = atomic_load(&team.round);
    return round == done || round % 2 == 0 || number > atomic_load(&team.most);
}

static void sleep_while_idle(long number, long done)
{
    pthread_mutex_lock(&team.mutex);
    for (int idle = 1; idle;) {
        int counts = number <= atomic_load(&team.most);
        atomic_fetch_add(&team.asleep, counts); /* before checking for tasks; the caller checks after adding them */
        idle = is_idle(number, done);
        if (idle)
            pthread_cond_wait(&team.wake, &team.mutex);
        atomic_fetch_sub(&team.asleep, counts);
    }
    pthread_mutex_unlock(&team.mutex);
}

static void *help(void *own)
{
    long number = (long)own, done = 0, spins = 0;
    for (;;) {
        if (is_idle(number, done)) {
            if (++spins < SPINS) {
                _mm_pause();
            } else {
                sleep_while_idle(number, done);
                spins = 0;
            }
            continue;
        }
        /* Either this helper sees that the tasks are over, or the caller sees that a helper is at work. */
        atomic_fetch_add(&team.inside, 1);
        long round = atomic_load(&team.round);
        if (round % 2 && round != done && number <= atomic_load(&team.most)) {
            work(&team.job, (int)number);
            done = round, spins = 0;
        }
        atomic_fetch_sub(&team.inside, 1);
    }
    return NULL;
}

static void forget_helpers(void) /* a forked child process has none */
{
    atomic_store(&team.inside, 0);
    atomic_store(&team.asleep, 0);
    atomic_store(&team.most, 0);
    atomic_store(&team.round, 0);
    atomic_flag_clear(&team.taken);
    pthread_mutex_init(&team.mutex, NULL);
    pthread_cond_init(&team.wake, NULL);
    team.helpers = 0;
}

static void start_helpers(int wanted)
{
    static atomic_flag registered = ATOMIC_FLAG_INIT;
    if (!atomic_flag_test_and_set(&registered))
        pthread_atfork(NULL, NULL, forget_helpers);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for Python's threads */
    while (team.helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(long)(team.helpers + 1)))
            break;
        pthread_detach(thread);
        team.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static int takes_team(void)
{
    for (int spins = 0; atomic_flag_test_and_set(&team.taken); spins++) {
        if (spins == PATIENCE)
            return 0;
        _mm_pause();
    }
    return 1;
}

int most_workers(void) { return threads ? threads : omp_get_max_threads(); }

void run_tasks(long count, task_of *task, void *argument)
{
    int workers = most_workers();
    struct share shares[workers];
    struct job job = {task, argument, workers, shares};
    if (!threads) {
        deal_out(count, &job);
#pragma omp parallel
        work(&job, omp_get_thread_num());
        return;
    }
    if (count < 2 || !takes_team()) {
        job.workers = 1;
        deal_out(count, &job);
        work(&job, 0);
        return;
    }
    if (team.helpers < workers - 1)
        start_helpers(workers - 1);
    deal_out(count, &job);
    team.job = job;
    int grows = atomic_exchange(&team.most, workers - 1) < workers - 1;
    atomic_fetch_add(&team.round, 1);
    if (atomic_load(&team.asleep) || grows) {
        pthread_mutex_lock(&team.mutex);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.mutex);
    }
    work(&job, 0);
    atomic_fetch_add(&team.round, 1);
    for (long spins = 1; atomic_load(&team.inside); spins++) {
        if (spins % 1000)
            _mm_pause();
        else
            sched_yield(); /* the awaited helper may need this core */
    }
    atomic_flag_clear(&team.taken);
}

/* From now on, a team of as many threads as this thread's OpenMP had, itself included, does its
   tasks, and its OpenMP has one thread: PyTorch's small operations then wake no helper. */
void amulet_enter_team(void)
{
    threads = omp_get_max_threads();
    omp_set_num_threads(1);
}

void amulet_leave_team(void)
{
    if (threads)
        omp_set_num_threads(threads);
    threads = 0;
}
