"""train.run with samples of the main thread's stack and a torch trace: python3 prof_run.py NAME FIRST LAST AT flags...
Samples steps FIRST..LAST every ms; profiles 2 steps from AT on. Rank 0 writes /tmp/logs/prof-NAME.txt, trace-NAME.json.gz."""
import collections, os, sys, threading, time
sys.path.insert(0, os.getcwd())
import torch

name, *numbers = os.environ.get("PROF", "none 0 0 0").split()
first, last, at = map(int, numbers)
rank = int(os.environ.get("RANK", "0"))
L = "/tmp/logs"


class Sampler(threading.Thread):
    def __init__(self, ident):
        super().__init__(daemon=True)
        self.ident_, self.on, self.n = ident, True, 0
        self.top, self.cum = collections.Counter(), collections.Counter()

    def run(self):
        while self.on:
            time.sleep(0.0007)
            frame = sys._current_frames().get(self.ident_)
            lines, f, seen = [], frame, set()
            while f:
                lines.append(f"{os.path.basename(os.path.dirname(f.f_code.co_filename))}/{os.path.basename(f.f_code.co_filename)}:{f.f_lineno} {f.f_code.co_name}")
                f = f.f_back
            self.n += 1
            if lines:
                self.top[lines[0]] += 1
            for x in lines:
                if x not in seen:
                    seen.add(x); self.cum[x] += 1


def main():
    from nanofuse.train import loop
    from nanofuse.train.run import main as run
    state = {"n": 0, "times": []}
    inner = loop.Trainer.train_step

    def train_step(self):
        n = state["n"]
        if rank == 0 and n == first:
            torch.cuda.synchronize()
            state["began"] = time.perf_counter()
            state["sampler"] = Sampler(threading.get_ident()); state["sampler"].start()
        if rank == 0 and n == last:
            s = state["sampler"]; s.on = False
            torch.cuda.synchronize()
            ms = (time.perf_counter() - state["began"]) / (last - first) * 1e3
            with open(f"{L}/prof-{name}.txt", "w") as out:
                print(f"{name}: {ms:.2f} ms/step sampled, {s.n} samples = {s.n / (last - first):.1f} a step", file=out)
                per = ms / (s.n / (last - first))
                for title, c, k in (("top", s.top, 32), ("cumulative", s.cum, 110)):
                    print("--", title, "(ms a step)", file=out)
                    for line, count in c.most_common(k):
                        print(f"{count * per / (last - first):8.2f}  {line}", file=out)
        if n == at:
            torch.cuda.synchronize()
            state["profile"] = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA])
            state["profile"].__enter__()
        if n == at + 2:
            torch.cuda.synchronize()
            state["profile"].__exit__(None, None, None)
            if rank == 0:
                state["profile"].export_chrome_trace(f"{L}/trace-{name}.json.gz")
        state["n"] = n + 1
        with torch.profiler.record_function("train_step"):
            return inner(self)

    loop.Trainer.train_step = train_step
    run([x for x in sys.argv[1:] if x != '--'])


if __name__ == "__main__":
    main()
