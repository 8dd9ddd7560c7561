/* Runs the tasks of a product or an attention on several threads. */

typedef void task_of(void *argument, long task, int worker);

/* How many workers `run_tasks` of this thread may have at most. */
int most_workers(void);

/* Call `task(argument, number, worker)` for each number below `count`, in any order; the worker is
   the index of the thread, so that each has memory of its own. */
void run_tasks(long count, task_of *task, void *argument);
