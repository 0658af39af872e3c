"use strict";
// Pointing at a chart tells the values of the nearest step.
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const spell = (value) => (value === null ? "not finite" : Number(value.toPrecision(5)).toString());
  let first = Infinity;
  let last = -Infinity;
  for (const chart of charts) {
    for (const series of chart.series) {
      for (const [step] of series.points) {
        first = Math.min(first, step);
        last = Math.max(last, step);
      }
    }
  }
  const span = Math.max(last - first, 1);

  for (const figure of document.querySelectorAll(".chart")) {
    const { series } = charts[Number(figure.dataset.chart)];
    const plot = figure.querySelector(".plot");
    const cursor = figure.querySelector(".cursor");
    const output = figure.querySelector("output");
    const steps = [...new Set(series.flatMap((one) => one.points.map(([step]) => step)))].sort((a, b) => a - b);
    let place = -1;

    const tell = (index) => {
      place = Math.min(Math.max(index, 0), steps.length - 1);
      const step = steps[place];
      cursor.setAttribute("d", `M${((step - first) / span) * 1000} 0V300`);
      const values = series.map((one) => {
        const found = one.points.find(([other]) => other === step);
        const value = found === undefined ? "–" : spell(found[1]);
        return series.length > 1 ? `${one.name.split("/").pop()} ${value}` : value;
      });
      output.textContent = `step ${step}: ${values.join(", ")}`;
    };
    const quiet = () => {
      cursor.setAttribute("d", "");
      output.textContent = "";
    };
    const nearest = (step) => {
      let best = 0;
      for (let i = 1; i < steps.length; i += 1) {
        if (Math.abs(steps[i] - step) < Math.abs(steps[best] - step)) best = i;
      }
      return best;
    };

    plot.addEventListener("pointermove", (event) => {
      const box = figure.querySelector(".lines").getBoundingClientRect();
      tell(nearest(first + ((event.clientX - box.left) / box.width) * span));
    });
    plot.addEventListener("pointerleave", quiet);
    plot.addEventListener("blur", quiet);
    plot.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1 };
      if (event.key in moves) {
        event.preventDefault();
        tell(place < 0 ? 0 : place + moves[event.key]);
      }
    });
  }
})();
