/* Helpers for a decode step: hundreds of products of some 50 microseconds each, one after another.

   OpenMP's threads wait for each other at the end of each, so that a core which another program
   uses holds up all of them; and GNU's wait asleep as soon as two threads of a program have
   computed. Here the caller takes whatever task no helper has taken, and waits for tasks alone that
   are being done. There is one team; a second caller at the same time does its tasks by itself. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>

#include <immintrin.h>
#include <omp.h>

#include "threads.h"

enum { MOST_HELPERS = 255, SPINS = 20000 }; /* pauses, some tenths of a millisecond, until a helper sleeps */

static struct {
    _Alignas(64) atomic_long round; /* odd: there are tasks */
    _Alignas(64) atomic_long next;
    _Alignas(64) atomic_int inside, asleep;
    _Alignas(64) atomic_flag taken;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int helpers, most; /* how many there are, and how many of them these tasks may have */
    long tasks;
    task_of *task;
    void *argument;
} team = {.taken = ATOMIC_FLAG_INIT, .mutex = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

static _Thread_local int own_helpers; /* of this thread's calls; 0: OpenMP's threads */

static void work(int worker)
{
    long task;
    while ((task = atomic_fetch_add(&team.next, 1)) < team.tasks)
        team.task(team.argument, task, worker);
}

static void sleep_until(long done)
{
    pthread_mutex_lock(&team.mutex);
    atomic_fetch_add(&team.asleep, 1);
    for (long now = atomic_load(&team.round); now == done || now % 2 == 0;
         now = atomic_load(&team.round))
        pthread_cond_wait(&team.wake, &team.mutex);
    atomic_fetch_sub(&team.asleep, 1);
    pthread_mutex_unlock(&team.mutex);
}

static void *help(void *number)
{
    long done = 0, spins = 0;
    for (;;) {
        long round = atomic_load(&team.round);
        if (round == done || round % 2 == 0) {
            if (++spins < SPINS) {
                _mm_pause();
            } else {
                sleep_until(done);
                spins = 0;
            }
            continue;
        }
        /* Either this sees that the tasks are over, or the caller sees that somebody is inside. */
        atomic_fetch_add(&team.inside, 1);
        if (atomic_load(&team.round) == round && (long)number <= team.most)
            work((int)(long)number);
        atomic_fetch_sub(&team.inside, 1);
        done = round, spins = 0;
    }
    return NULL;
}

static void forget_helpers(void) /* a forked child has none */
{
    atomic_store(&team.inside, 0);
    atomic_store(&team.asleep, 0);
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
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for Python's threads */
    while (team.helpers < wanted && team.helpers < MOST_HELPERS) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(long)(team.helpers + 1)))
            break;
        pthread_detach(thread);
        team.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

int most_workers(void) { return own_helpers ? own_helpers + 1 : omp_get_max_threads(); }

void run_tasks(long count, task_of *task, void *argument)
{
    if (!own_helpers) {
#pragma omp parallel for schedule(dynamic, 1)
        for (long number = 0; number < count; number++)
            task(argument, number, omp_get_thread_num());
        return;
    }
    if (count < 2 || atomic_flag_test_and_set(&team.taken)) {
        for (long number = 0; number < count; number++)
            task(argument, number, 0);
        return;
    }
    if (team.helpers < own_helpers)
        start_helpers(own_helpers);
    team.task = task, team.argument = argument, team.tasks = count, team.most = own_helpers;
    atomic_store(&team.next, 0);
    atomic_fetch_add(&team.round, 1);
    if (atomic_load(&team.asleep)) {
        pthread_mutex_lock(&team.mutex);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.mutex);
    }
    work(0);
    atomic_fetch_add(&team.round, 1);
    for (long spins = 1; atomic_load(&team.inside); spins++) {
        if (spins % 1000)
            _mm_pause();
        else
            sched_yield(); /* who is waited for may want this very core */
    }
    atomic_flag_clear(&team.taken);
}

/* From now on this thread's tasks are done by a team of so many threads, itself included, and its
   OpenMP is one thread: PyTorch's small operations then wake nobody. */
void amulet_enter_team(int threads)
{
    own_helpers = threads - 1 < MOST_HELPERS ? threads - 1 : MOST_HELPERS;
    omp_set_num_threads(1);
}

void amulet_leave_team(int threads)
{
    own_helpers = 0;
    omp_set_num_threads(threads);
}
