// The page: charts that share a view, the switches over them, and reloading while the run goes on.

{
  const RELOAD_EVERY = 30; // seconds, if nobody is looking closely
  const GIVEN_UP = 900; // without a new page for so long, the run is taken to be over

  const data = JSON.parse(document.getElementById("report-data").textContent);
  const view = { axis: "step", range: null, extent: [0, 1], cursor: null, hidden: new Set() };
  const all = (selector) => [...document.querySelectorAll(selector)];
  const specs = Object.fromEntries(data.charts.map((spec) => [spec.name, spec]));
  const reset = document.getElementById("reset");

  const draw = (what) => {
    if (what === "cursor") return charts.forEach((chart) => chart.marks && chart.point());
    if (reset) reset.hidden = !view.range;
    charts.forEach((chart) => chart.draw());
  };
  const charts = all("[data-chart]").map((box) => new Chart(box, specs[box.dataset.chart], data, view, draw));

  // What is switched is kept in the address, so that a reload, or a copied link, shows the same.
  const settings = new URLSearchParams(location.hash.slice(1));
  const keep = (name, value) => {
    if (value) settings.set(name, value);
    else settings.delete(name);
    history.replaceState(null, "", `#${settings}`);
  };

  const setAxis = (axis) => {
    view.axis = axis;
    view.range = view.cursor = null;
    charts.forEach((chart) => chart.moveTo(axis));
    const ends = charts.flatMap((chart) => chart.lines.filter((line) => line.xs.length).map((line) => line.xs));
    const last = Math.max(...ends.map((xs) => xs[xs.length - 1]));
    const first = Math.min(...ends.map((xs) => xs[0]));
    view.extent = last > first ? [first, last] : [first - 1, last + 1];
    all("[data-axis]").forEach((button) => button.setAttribute("aria-pressed", button.dataset.axis === axis));
    draw();
  };
  const setLog = (button, on) => {
    charts.find((chart) => chart.spec.name === button.dataset.log).log = on;
    button.setAttribute("aria-pressed", on);
    draw();
  };

  all("[data-axis]").forEach((button) =>
    button.addEventListener("click", () => {
      setAxis(button.dataset.axis);
      keep("axis", button.dataset.axis);
    }),
  );
  all("[data-log]").forEach((button) =>
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      setLog(button, on);
      keep(`log-${button.dataset.log}`, on ? "1" : "0");
    }),
  );
  all("[data-run]").forEach((button) =>
    button.addEventListener("click", () => {
      const run = Number(button.dataset.run);
      if (!view.hidden.delete(run)) view.hidden.add(run);
      button.setAttribute("aria-pressed", !view.hidden.has(run));
      draw();
    }),
  );
  all("[data-only-changed]").forEach((button) =>
    button.addEventListener("click", () => {
      const on = button.closest("section").classList.toggle("only-changed");
      button.setAttribute("aria-pressed", on);
    }),
  );
  reset?.addEventListener("click", () => {
    view.range = null;
    draw();
  });

  if (charts.length) {
    setAxis(settings.get("axis") in AXES ? settings.get("axis") : "step");
    all("[data-log]").forEach((button) => {
      const asked = settings.get(`log-${button.dataset.log}`);
      setLog(button, asked ? asked === "1" : specs[button.dataset.log].log);
    });
    new ResizeObserver(() => draw()).observe(document.getElementById("curves"));
  }

  if (data.running) {
    const age = () => Date.now() / 1e3 - data.written;
    const reload = document.getElementById("reload");
    const say = () => {
      const silent = age() > GIVEN_UP;
      reload.textContent = `${silent ? "no word for" : "written"} ${clock(Math.max(0, Math.round(age())))}${silent ? "" : " ago"}: reload`;
    };
    // Not under the hands of someone who has zoomed, or points at something.
    const auto = () => {
      const busy = document.hidden || view.range || view.cursor || age() > GIVEN_UP;
      if (!busy && age() > RELOAD_EVERY && performance.now() > 1e3 * RELOAD_EVERY) location.reload();
    };
    reload.addEventListener("click", () => location.reload());
    document.addEventListener("visibilitychange", auto);
    setInterval(() => (say(), auto()), 5000);
    say();
  }
}
