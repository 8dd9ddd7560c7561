/* Runs the tasks of a product or an attention on several threads. */

typedef void task_of(void *argument, long task, int worker);

/* The maximum number of workers of `run_tasks` on this thread. */
int most_workers(void);

/* Call `task(argument, number, worker)` for each number below `count`, in any order; `worker` is
   the index of the thread, so that each can have its own memory. */
void run_tasks(long count, task_of *task, void *argument);
