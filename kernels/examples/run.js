// A file of `ticketkit export` in Node:  npm install onnxruntime-node && node run.js MODEL.onnx 1,3,224,224
//
// onnxruntime-node cannot register a library of operators, so it is a stock runtime: it loads the same small file, folds it to plain
// convolutions, and gives the same outputs at dense speed.
'use strict';
const ort = require('onnxruntime-node');

async function main(path, shape) {
  const options = { intraOpNumThreads: 1, logSeverityLevel: 3 };
  const session = await ort.InferenceSession.create(path, options);
  const [input, output] = [session.inputNames[0], session.outputNames[0]];
  const count = shape.reduce((product, size) => product * size, 1);
  const x = Float32Array.from({ length: count }, (_, i) => (Math.imul(i, 2654435761) >>> 0) / 4294967296 - 0.5);
  const feed = { [input]: new ort.Tensor('float32', x, shape) };
  const y = (await session.run(feed))[output];
  const times = [];
  for (let i = 0; i < 11; ++i) {
    const start = performance.now();
    await session.run(feed);
    times.push(performance.now() - start);
  }
  console.log(`stock: ${Array.from(y.data, (value) => value.toPrecision(9)).join(' ')}`);
  console.log(`stock takes ${times.sort((a, b) => a - b)[5].toPrecision(3)} ms`);
}

if (process.argv.length !== 4) {
  console.error('usage: node run.js MODEL.onnx SHAPE, such as 1,3,224,224');
  process.exitCode = 2;
} else {
  main(process.argv[2], process.argv[3].split(',').map(Number)).catch((error) => {
    console.error(`error: ${error.message}`);
    process.exitCode = 1;
  });
}
