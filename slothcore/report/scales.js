"use strict";
// From values to places and words: ticks, numbers, and the table that turns steps into time and tokens.

const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400];

/** Round values between low and high, about `count` of them. */
function linearTicks(low, high, count, steps) {
  const rough = (high - low) / Math.max(1, count);
  let step = steps && steps.find((s) => s >= rough);
  if (!step) {
    const power = 10 ** Math.floor(Math.log10(rough));
    step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  }
  const ticks = [];
  // Counted, not summed: 0.1 + 0.2 is no round number.
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9 && ticks.length < 50; i++) {
    ticks.push(i * step);
  }
  return ticks;
}

/** Powers of ten between low and high; where there are few, 2 and 5 times them too. */
function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const factors = last - first <= 2 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil((last - first) / count));
  const ticks = [];
  for (let power = first; power <= last; power += every) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) ticks.push(value);
    }
  }
  return ticks.length > 1 ? ticks : linearTicks(low, high, count);
}

/** A value in at most `digits` digits. */
function figure(value, digits = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6) return short(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    return `${parseFloat(mantissa)}e${parseInt(exponent, 10)}`;
  }
  return String(parseFloat(value.toPrecision(digits)));
}

/** 1.5M, 20k, 300. */
function short(value) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${parseFloat((value / size).toPrecision(3))}${unit}`;
  }
  return String(Math.round(value));
}

/** Seconds as 45s, 3:20, 2:05:00. */
function clock(seconds) {
  const whole = Math.round(seconds);
  if (seconds < 60) return `${parseFloat(seconds.toPrecision(3))}s`;
  const two = (number) => String(number).padStart(2, "0");
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, two(whole % 60)];
  return hours ? `${hours}:${two(minutes)}:${rest}` : `${minutes}:${rest}`;
}

const AXES = {
  step: { word: (x) => `step ${Math.round(x).toLocaleString("en-US")}`, tick: (x) => (x >= 1e5 ? short(x) : figure(x)) },
  elapsed: { word: clock, tick: clock, steps: TIMES },
  tokens: { word: (x) => `${short(x)} tokens`, tick: short },
};

/** Index of the last of the rising `values` that is not above `value`; 0 if all are. */
function lastNotAbove(values, value) {
  let [low, high] = [0, values.length - 1];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (values[middle] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** Index of the value that is nearest. */
function nearest(values, value) {
  const below = lastNotAbove(values, value);
  const above = Math.min(below + 1, values.length - 1);
  return value - values[below] > values[above] - value ? above : below;
}

/** Where `step` of a run lies on an axis: the step itself, or the time or tokens until there. */
function place(run, axis, step) {
  if (axis === "step") return step;
  const steps = run.axis[`${axis}_steps`];
  const values = run.axis[axis];
  const i = lastNotAbove(steps, step);
  const j = Math.min(i + 1, steps.length - 1);
  if (steps[j] === steps[i]) return values[j];
  return values[i] + ((values[j] - values[i]) * Math.min(step - steps[i], steps[j] - steps[i])) / (steps[j] - steps[i]);
}
